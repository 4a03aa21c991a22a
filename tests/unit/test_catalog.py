"""The catalogue: what names stand for, and what is refused before anything heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tether import catalog
from tether.catalog import ModelSpec, check, near_matches, resolve
from tether.errors import ModelUnavailable

PLENTY = 1 << 50


def write_safetensors(path: Path, shapes: dict[str, list[int]], *, cut: int = 0) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, size = end, 4
        for length in shape:
            size *= length
        end += size
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(end - cut))


def make_folder(root: Path, name: str = "my-model", **config: int) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"a": [10, 20], "b": [7]})
    return folder


def refusal(spec: ModelSpec, *, free_bytes: int = PLENTY, offline: bool = True) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        check(spec, free_bytes=free_bytes, offline=offline)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("name", "source", "gated", "toy"),
    [
        ("phi-2", "microsoft/phi-2", False, False),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1", True, False),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", True, False),
        ("granite-4.0-micro", "ibm-granite/granite-4.0-micro", False, False),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", False, False),
        ("tinygpt2", "sshleifer/tiny-gpt2", False, True),
    ],
)
def test_each_name_of_the_pilot_stands_for_its_repository(name: str, source: str, gated: bool, toy: bool) -> None:
    spec = resolve(name)
    assert (spec.name, spec.version, spec.kind, spec.source) == (name, "1.0", "hub", source)
    assert (spec.gated, spec.toy) == (gated, toy)
    assert spec.num_bytes
    assert spec.memory_need_bytes
    assert spec.description


def test_the_demo_model_ships_with_the_package_and_is_a_toy() -> None:
    spec = check(resolve("demo"), free_bytes=PLENTY, offline=True)
    assert (spec.name, spec.version, spec.kind, spec.toy) == ("demo", "1.0", "package", True)
    assert spec.folder is not None
    assert "toy" in (spec.folder / "README.md").read_text(encoding="utf-8").lower()
    assert spec.num_bytes
    assert spec.num_bytes < 5_000_000
    stated = resolve("demo")
    assert stated.num_parameters == spec.num_parameters
    assert stated.kv_values_per_token == spec.kv_values_per_token
    assert stated.context_tokens == spec.context_tokens


def test_names_are_found_in_any_case_and_with_a_revision() -> None:
    assert resolve("PHI-2").name == "phi-2"
    assert resolve("phi-2@abc123").revision == "abc123"
    assert resolve("phi-2").revision == "main"


def test_a_hugging_face_id_is_served_under_its_own_name() -> None:
    spec = resolve("someone/some-model@v2")
    assert (spec.name, spec.source, spec.revision, spec.kind) == (
        "someone/some-model",
        "someone/some-model",
        "v2",
        "hub",
    )
    known = resolve("microsoft/phi-2")
    assert (known.name, known.num_parameters) == ("microsoft/phi-2", resolve("phi-2").num_parameters)


def test_a_local_folder_is_served_under_the_folders_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    spec = resolve(str(folder))
    assert (spec.name, spec.version, spec.kind, spec.folder) == ("my-model", "1.0", "folder", folder)
    renamed = spec.served_as("ours", "2.1")
    assert (renamed.name, renamed.version, renamed.source) == ("ours", "2.1", spec.source)


def test_a_catalogue_name_goes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, "phi-2")
    monkeypatch.chdir(tmp_path)
    assert resolve("phi-2").kind == "hub"
    assert resolve("./phi-2").kind == "folder"


@pytest.mark.parametrize("name", ["./nope", "/nope/nope", "~/nope"])
def test_a_folder_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ModelUnavailable, match="there is no folder"):
        resolve(name)


def test_a_misspelt_name_is_refused_with_near_matches() -> None:
    with pytest.raises(ModelUnavailable, match=r"there is no model `ph2`; did you mean `phi-2`\?"):
        resolve("ph2")
    with pytest.raises(ModelUnavailable, match="choose one of demo, "):
        resolve("zzzzzz")


@pytest.mark.parametrize("name", ["", "a b/c", "a/b/c", "org/"])
def test_what_can_be_no_name_is_refused(name: str) -> None:
    with pytest.raises(ModelUnavailable, match="there is no model"):
        resolve(name)


def test_near_matches_look_past_case_and_into_longer_names() -> None:
    names = ["phi-2", "mistral-7b", "llama-3-8b", "tinyllama"]
    assert near_matches("Phi2", names) == ["phi-2"]
    assert near_matches("llama", names) == ["tinyllama", "llama-3-8b"]
    assert near_matches("", names) == []
    assert near_matches("qqqq", names) == []


def test_a_model_that_does_not_fit_is_refused_with_both_figures() -> None:
    spec = resolve("demo")
    assert spec.memory_need_bytes
    assert check(spec, free_bytes=spec.memory_need_bytes, offline=True).name == "demo"
    message = refusal(spec, free_bytes=spec.memory_need_bytes - 1)
    assert message.startswith("`demo` needs 0.4 GB of memory as float32 and 0.4 GB are free")


def test_memory_need_of_a_folder_comes_from_headers_and_config(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=100,
    )  # fmt: skip
    spec = check(resolve(str(folder)), free_bytes=PLENTY)
    assert spec.num_parameters == 207
    assert spec.kv_values_per_token == 2 * 3 * 2 * 8
    assert spec.context_tokens == 100
    assert spec.memory_need_bytes == catalog.RUNTIME_BYTES + (207 + 96 * 100) * 4
    assert spec.with_dtype("bfloat16").memory_need_bytes == catalog.RUNTIME_BYTES + (207 + 96 * 100) * 2
    assert spec.num_bytes == (folder / "model.safetensors").stat().st_size


def test_small_models_are_float32_and_big_ones_bfloat16_unless_asked_otherwise() -> None:
    assert resolve("demo").load_dtype == "float32"
    assert resolve("phi-2").load_dtype == "bfloat16"
    assert resolve("phi-2").with_dtype("float32").load_dtype == "float32"
    with pytest.raises(ModelUnavailable, match="cannot be loaded as `int3`"):
        resolve("phi-2").with_dtype("int3")


@pytest.mark.parametrize(
    ("file", "named"),
    [("config.json", "config.json"), ("tokenizer.json", "tokenizer"), ("model.safetensors", "weights")],
)
def test_a_folder_with_a_part_missing_is_refused_by_the_parts_name(tmp_path: Path, file: str, named: str) -> None:
    folder = make_folder(tmp_path)
    (folder / file).unlink()
    message = refusal(resolve(str(folder)))
    assert "is not a model: it has no" in message
    assert named in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors" in refusal(resolve(str(folder)))


@pytest.mark.parametrize("broken", ["cut", "pointer", "empty", "header"])
def test_weights_that_are_cut_short_or_no_safetensors_are_refused(tmp_path: Path, broken: str) -> None:
    folder = make_folder(tmp_path)
    weights = folder / "model.safetensors"
    match broken:
        case "cut":
            write_safetensors(weights, {"a": [10, 20]}, cut=1)
        case "pointer":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n")
        case "empty":
            weights.write_bytes(b"")
        case _:
            weights.write_bytes((2).to_bytes(8, "little") + b"[]")
    assert "is cut short or is not a safetensors file" in refusal(resolve(str(folder)))


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "config.json").write_text("{")
    assert "config.json` cannot be read" in refusal(resolve(str(folder)))


def test_a_model_of_the_hub_is_refused_offline_with_what_to_do() -> None:
    message = refusal(resolve("phi-2"), offline=True)
    assert "download it first with a network (`hf download microsoft/phi-2`), or use a local folder" in message


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_hubs_own_variable_says_offline(value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert catalog.offline_wanted() is wanted


def test_the_weights_hash_changes_with_any_byte_and_says_how_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path)
    before = catalog.weights_hash(folder)
    assert before.startswith("sha256:")
    assert catalog.weights_hash(folder) == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert catalog.weights_hash(folder) != before
    monkeypatch.setattr(catalog, "WHOLE_HASH_BYTES", 10)
    assert catalog.weights_hash(folder).startswith("headers:")


def test_the_tokenizer_hash_covers_the_chat_template(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    before = catalog.tokenizer_hash(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert catalog.tokenizer_hash(folder) != before


def test_free_memory_is_what_can_still_be_taken() -> None:
    assert 0 < catalog.free_memory_bytes() < 1 << 46


def test_asking_the_catalogue_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tether.catalog import catalogue, check, resolve; catalogue(); resolve('phi-2');"
        "check(resolve('demo'), free_bytes=1 << 40);"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
