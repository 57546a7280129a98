"""The conversion tool: in, out, look inside; and what it says when something does not fit."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import TOKENIZER
from tests.checkpoint.foreign import BASE, random_resampler, write_clip, write_decoder
from tests.dist import run_script

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert.py"
SIZES = ("num_layers", "hidden", "head_dim", "ffn", "vocab_size", "rope_base")
TINY = [
    *("--preset", "tiny", "--data.tokenizer", TOKENIZER),
    *(f"--model.decoder.{name}={vars(BASE)[name]}" for name in SIZES),
]


@pytest.fixture(scope="module")
def convert() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    write_clip(folder / "clip")
    write_decoder(folder / "qwen2", "qwen2")
    save_file(random_resampler(BASE.hidden, 16), folder / "projector.safetensors")
    return folder


def sources(foreign: Path) -> list[str]:
    places = {"tower": "clip", "decoder": "qwen2", "resampler": "projector.safetensors"}
    return [f"--init.{part}={foreign / name}" for part, name in places.items()]


def write_header_only(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16 zeros that takes no disk: its data is a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_weights_go_in_and_come_out_again_verified(
    convert: ModuleType, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, out = tmp_path / "ours", tmp_path / "out"
    assert convert.main(["import", *TINY, *sources(foreign), "--verify", "--out", str(ours)]) == 0
    printed = capsys.readouterr().out
    assert "tower: verified" in printed and "decoder: verified" in printed
    assert f"--init.checkpoint {ours}" in printed
    for what in ("vlm", "decoder", "tower"):
        arguments = ["export", "--checkpoint", str(ours), "--what", what, "--out", str(out / what), "--verify"]
        fill = ["--fill-from", str(foreign / "clip")] if what == "tower" else []
        assert convert.main([*arguments, *fill]) == 0, what
        assert f"{what}: verified" in capsys.readouterr().out
        assert (out / what / "config.json").is_file()
    for what, name in (("decoder", "qwen2"), ("tower", "clip")):
        found, expected = (load_file(x / "model.safetensors") for x in (out / what, foreign / name))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert (out / "decoder" / "tokenizer.json").is_file()
    for what, parts in {"vlm": ("tower", "resampler", "decoder"), "decoder": ("decoder",), "tower": ("tower",)}.items():
        init = [f"--init.{part}={out / what}" for part in parts]
        again = out / f"{what} again"
        assert convert.main(["import", *TINY, *init, "--out", str(again)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines] == [*parts, "written"]  # and nothing beside
        assert "left aside" not in lines[0]
        assert convert.main(["inspect", str(out / what)]) == 0
        assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} <= {f"{p}:" for p in parts} | {
            *parts
        }


def test_every_command_judges_a_folder_alike(
    convert: ModuleType, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "decoder"
    shutil.copytree(foreign / "qwen2", folder)
    (folder / "adapter_config.json").write_text("{}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    arguments = ["import", *TINY, f"--init.decoder={folder}", "--out", str(tmp_path / "ours")]
    for command in (arguments, [*arguments, "--dry-run"], ["inspect", str(folder)]):
        assert convert.main(command) == 2
        message = capsys.readouterr().err
        assert "adapter_config.json beside the weights" in message and "quantization_config is 'gptq'" in message
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "glow": 1}))
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    for command in (arguments, [*arguments, "--dry-run"], ["inspect", str(folder)]):
        assert convert.main(command) == 0
        printed = capsys.readouterr().out
        assert "'glow' = 1 is unknown here and not used" in printed
        assert "'model.safetensors' is read, not 'pytorch_model.bin'" in printed


def test_a_checkpoint_with_a_nan_is_no_start(
    convert: ModuleType,
    foreign: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sicog_mcore.checkpoint import weights

    broken = {name: tensor.clone() for name, tensor in load_file(foreign / "projector.safetensors").items()}
    broken["ln_q.bias"][2] = float("nan")
    save_file(broken, tmp_path / "projector.safetensors")
    arguments = [
        "import",
        *TINY,
        f"--init.resampler={tmp_path / 'projector.safetensors'}",
        "--out",
        str(tmp_path / "ours"),
    ]
    assert convert.main(arguments) == 2
    assert "NaN or infinite values in 1 tensors: ln_q.bias in projector.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
    with monkeypatch.context() as patched:  # as an earlier version wrote it
        patched.setattr(weights.FiniteWatch, "see", lambda *_: None)
        assert convert.main(arguments) == 0
    capsys.readouterr()
    assert (
        convert.main(["import", *TINY, f"--init.checkpoint={tmp_path / 'ours'}", "--out", str(tmp_path / "two")]) == 2
    )
    assert "NaN or infinite values in 1 tensors: resampler.ln_q.bias" in capsys.readouterr().err


def test_an_export_can_change_the_dtype_and_do_without_a_tokenizer(
    convert: ModuleType, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, out = tmp_path / "ours", tmp_path / "out"
    tiny = [argument for argument in TINY if argument not in ("--data.tokenizer", TOKENIZER)]
    assert convert.main(["import", *tiny, *sources(foreign), "--out", str(ours)]) == 0
    arguments = ["export", "--checkpoint", str(ours), "--out", str(out)]
    assert convert.main([*arguments, "--what", "decoder", "--dtype", "bf16"]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert convert.main([*arguments, "--what", "decoder"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert.main(["export", "--checkpoint", str(ours), "--out", str(tmp_path / "vlm")]) == 2
    assert "give --tokenizer FILE" in capsys.readouterr().err


def test_a_dry_run_prints_both_sides_of_real_sizes_without_reading_a_tensor(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    from sicog_mcore import presets
    from sicog_mcore.checkpoint.hf_config import decoder_config

    values = decoder_config(presets.QWEN2_0_5B, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    write_header_only(tmp_path / "model.safetensors", shapes)
    arguments = ["import", "--preset", "uhd_qwen2_0_5b", "--init.decoder", str(tmp_path), "--dry-run"]
    assert convert.main(arguments) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if " -> " in line]
    assert sorted(line[0] for line in lines) == sorted(shapes)
    assert "decoder: 494,032,768 parameters" in printed and "tower: drawn at random" in printed
    assert next(line for line in printed.splitlines() if "layers.23.self_attn.k_proj.weight" in line).split() == [
        *("model.layers.23.self_attn.k_proj.weight", "[128,", "896]", "->"),
        *("language_model.decoder.layers.23.self_attention.linear_qkv.weight", "[1152,", "896]"),
    ]
    assert convert.main([*arguments, "--model.decoder.num_layers=23"]) == 2
    message = capsys.readouterr().err
    assert "set model.decoder.num_layers=24" in message and "unexpected (12): model.layers.23." in message


def test_inspect_says_what_a_folder_holds(
    convert: ModuleType, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main(["inspect", str(foreign / "clip")]) == 0
    printed = capsys.readouterr().out
    assert "clip, CLIP, of which the vision tower is used" in printed and "F32" in printed
    assert convert.main(["import", *TINY, *sources(foreign), "--out", str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    assert convert.main(["inspect", str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().out
    assert "a checkpoint of this project, preset tiny" in printed
    assert "tower.transformer.layers.0.mlp.linear_fc1.weight" in printed and "optimizer" not in printed


def test_an_old_projector_file_becomes_safetensors_and_nothing_but_tensors_is_opened(
    convert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"model.mm_projector.{name}": tensor for name, tensor in random_resampler(64, 16).items()}
    torch.save(weights, tmp_path / "mm_projector.bin")
    arguments = ["--init.resampler", str(tmp_path / "mm_projector.bin"), "--out", str(tmp_path / "ours")]
    assert convert.main(["import", *TINY, *arguments]) == 2
    assert "mm_projector.bin" in capsys.readouterr().err
    new = tmp_path / "new.safetensors"
    assert convert.main(["unpickle", str(tmp_path / "mm_projector.bin"), "--out", str(new)]) == 0
    assert convert.main(["import", *TINY, "--init.resampler", str(new), "--out", str(tmp_path / "ours")]) == 0
    assert "resampler: 14 tensors" in capsys.readouterr().out
    torch.save({"x": Path("/")}, tmp_path / "evil.bin")
    for name in ("evil.bin", "nowhere.bin"):
        assert convert.main(["unpickle", str(tmp_path / name), "--out", str(tmp_path / "y.safetensors")]) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["import", *TINY], "nothing to write to; give --out FOLDER"),
        (["import", *TINY, "--modle.decoder=3", "--out", "x"], "no such field"),
        (["import", *TINY, "--init.decoder", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["export", "--checkpoint", "nowhere", "--out", "x"], "no checkpoint of this project"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect", "tests", "--whatever"], "unknown arguments: --whatever"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str], message: str, convert: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_verification_that_cannot_be_is_refused_before_anything_is_written(
    convert: ModuleType,
    foreign: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    arguments = ["import", *TINY, *sources(foreign), "--out", str(tmp_path / "ours")]
    assert convert.main([*arguments, "--verify"]) == 2
    assert "pip install -e .[hf]" in capsys.readouterr().err and not (tmp_path / "ours").exists()
    assert convert.main(arguments) == 0
    with pytest.raises(AssertionError, match="ended with 2"):
        run_script(TOOL, [*arguments[:-1], str(tmp_path / "two"), "--tensor", "2", "--verify"], 2)
    assert not (tmp_path / "two").exists()


def test_it_runs_on_two_ranks_on_cut_weights(foreign: Path, tmp_path: Path) -> None:
    ours, out = tmp_path / "ours", tmp_path / "out"
    printed = run_script(TOOL, ["import", *TINY, *sources(foreign), "--tensor", "2", "--out", str(ours)], 2)
    assert printed.count("decoder: 27 tensors") == 1
    run_script(
        TOOL, ["export", "--checkpoint", str(ours), "--out", str(out), "--what", "decoder", "--pipeline", "2"], 2
    )
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, foreign / "qwen2"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
