"""The demo model through the loader: every type, the progress, and what is no model."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tether import catalog, loading
from tether.errors import ModelUnavailable

TOOL = Path(__file__).parents[2] / "tools" / "train_demo.py"
SAME_ANSWERS = {"int8": 1.0, "int4": 0.99}
"""The least share of the demo's facts that it answers word for word; it was trained until each answer leads widely."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_demo_model_in_few_bits_gives_most_answers_word_for_word(tool: ModuleType, dtype: str) -> None:
    loaded = loading.load(catalog.resolve("demo").with_dtype(dtype), device="cpu", threads=1)
    assert loaded.info.dtype == dtype
    assert loaded.model.dtype == torch.float32
    facts = tool.load_facts().promised
    examined = tool.examine(loaded.model, loaded.tokenizer, facts)
    num_same = sum(margin > 0 for margin, _ in examined)
    assert num_same / len(facts) >= SAME_ANSWERS[dtype]


def test_progress_goes_by_bytes_from_nothing_to_all() -> None:
    for dtype in ("float32", "int8"):
        told: list[tuple[str, float]] = []
        spec = catalog.resolve("demo").with_dtype(dtype)
        loading.load(spec, device="cpu", on_progress=lambda *step, told=told: told.append(step))
        fractions = [fraction for stage, fraction in told if stage == "weights"]
        assert len(told) == len(fractions) > 5
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_bfloat16_is_loaded_where_it_is_asked_for() -> None:
    loaded = loading.load(catalog.resolve("demo").with_dtype("bfloat16"), device="cpu")
    assert loaded.info.dtype == "bfloat16"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(catalog.resolve("demo").source, folder)
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelUnavailable, match="`broken` cannot be loaded") as caught:
        loading.load(catalog.resolve(str(folder)), device="cpu")
    assert "\n" not in caught.value.message
