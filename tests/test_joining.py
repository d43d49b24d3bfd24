"""Importing fastreft takes no time, and PEFT knows ReFT all the same: each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import forked
import pytest

FRESH = "import sys; assert not {'fastreft', 'peft', 'transformers.trainer'} & set(sys.modules)\n"


def run(code: str, *path: str) -> str:
    done = forked.run(FRESH + code, path=path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_import_alone_is_light():
    code = "import sys, fastreft; print(sorted({'torch', 'peft', 'transformers', 'numpy'} & set(sys.modules)), dir(fastreft))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout
    assert found.startswith("[]") and "ReftConfig" in found


SAVED = """
import transformers
from peft import PeftModel
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
model = PeftModel.from_pretrained(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), FOLDER)
print(model.peft_config["default"].peft_type.value, len([n for n, _ in model.named_parameters() if ".reft." in n]))
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """The folder of a saved adapter of a one-block Llama."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastreft import ReftConfig

    folder = tmp_path_factory.mktemp("adapter")
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    get_peft_model(LlamaForCausalLM(config), ReftConfig(r=2)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "imports",
    [
        "import fastreft",
        "import peft; import fastreft",
        "import peft.tuners.lora; import fastreft",
        "from fastreft import ReftConfig",
        "import fastreft.tuner.config",
        "import transformers; from transformers import Trainer; import fastreft",
        "import fastreft, peft",
    ],
)
def test_peft_loads_an_adapter_whichever_is_imported_first(imports, adapter):
    found = run(
        f"import warnings; warnings.simplefilter('error', UserWarning)\n{imports}\nFOLDER = {adapter!r}\n{SAVED}"
    )
    assert "REFT 3" in found


@pytest.mark.parametrize("first", ["pyvene", "fastreft"])
def test_who_is_joined_gets_its_own_module_and_a_failure_is_a_warning(first, tmp_path):
    """A pyvene that is not one: importing it works all the same, and says that we do not work with it."""
    (tmp_path / "pyvene").mkdir()
    (tmp_path / "pyvene" / "__init__.py").write_text("here = __name__, __spec__.loader, __loader__\n")
    second = "fastreft" if first == "pyvene" else "pyvene"
    code = f"import {first}\nimport {second}\nimport pyvene; print(pyvene.here[0], type(pyvene.here[1]).__name__)"
    found = run(code, str(tmp_path))
    assert "pyvene SourceFileLoader" in found
    assert "fastreft does not work with this pyvene: AttributeError" in found
