"""stub"""


def write(cells):
    print({k: {a: b for a, b in v.items() if a != "curve"} for k, v in cells.items()})
