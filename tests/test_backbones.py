"""Every promise, on every named backbone, each with its real processor."""

import pytest
from conformance import CHECKS, run

NAMED = """
qwen2_5_vl paligemma mllama qwen2_vl qwen3_vl qwen3_5 idefics3 smolvlm gemma3 internvl llava_onevision
mistral3 aya_vision lfm2_vl minicpmv4_6
""".split()


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("check", CHECKS)
def test_backbone(name, check, tmp_path):
    run(check, name, tmp_path)
