"""`python -m metaembed` is the command `metaembed`."""

from metaembed.app.cli import main

if __name__ == "__main__":
    main()
