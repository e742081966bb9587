"""What the benchmarks keep, and the page and tables that are made of it."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from processes import LIMIT
from vae_helpers import small_vae

from comfyui_patchconv.cli.demo import SMALL_VAE
from comfyui_patchconv.files.tensors import read_header
from comfyui_patchconv.files.vae import load_vae

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import charts  # noqa: E402
import harness  # noqa: E402
import on_gpu  # noqa: E402
import report  # noqa: E402
import tiles  # noqa: E402
import train_vae  # noqa: E402
import widened  # noqa: E402
from gpu import cases, process, work  # noqa: E402

HEAD = ["image", "method", "peak MB", "s"]
ROWS = [
    ["512²", "eager", "200", "4.0"],
    ["512²", "ours", "50", "3.0"],
    ["1024²", "eager", "out of memory", ""],
    ["1024²", "ours", "100", "12.0"],
]
RESULT = harness.Result("A decode", "What it is.", HEAD, ROWS, "a machine", {"torch": "2.13.0"}, "2026-11-24",
                        "python benchmarks/a.py", ["peak MB", "s"], "1234567")  # fmt: skip
KEPT = {"a": RESULT}


def published(folder: Path, **changes: Any) -> harness.Result:
    values: dict[str, Any] = dict(name="a", title="A", what="What.", head=HEAD, rows=ROWS, device="cpu", folder=folder)
    return harness.Result(**json.loads(harness.publish(**values | changes).read_text(encoding="utf-8")))


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/a/benchmarks/a.py", "--sizes", "512", "--to", "/home/a/b.py", "--x=/c/d"])
    monkeypatch.setenv("COMFYUI_PATH", "/home/a/ComfyUI")
    environment = ["COMFYUI_PATH", "COMFYUI_PYTHON_THAT_IS_NOT_SET"]
    found = published(tmp_path, packages=["safetensors"], versions={"peer": "7"}, environment=environment)
    assert found.rows == ROWS
    assert found.command == "COMFYUI_PATH=… python benchmarks/a.py --sizes 512 --to …/b.py --x=…/d"
    assert {"torch", "Python", "safetensors"} < set(found.versions)
    assert found.versions["peer"] == "7"
    assert torch.backends.cpu.get_cpu_capability() in found.machine
    known = (harness.ROOT / ".git").exists() and shutil.which("git") is not None
    assert re.fullmatch(r"[0-9a-f]{7,}\+?" if known else "", found.commit)
    assert found.date.startswith("20")
    assert "| 512²  | ours   | 50            | 3.0  |" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a row of 3 cells under 4 headings"):
        published(tmp_path, rows=[*ROWS, ROWS[0][:3]])
    with pytest.raises(ValueError, match="no column is called 'MB'; there are image, method, peak MB, s"):
        published(tmp_path, bars=["MB"])
    with pytest.raises(ValueError, match="two columns are called 's'"):
        published(tmp_path, head=["image", "s", "peak MB", "s"])
    assert not [*tmp_path.iterdir()]


def test_the_page_says_all_that_was_kept() -> None:
    page = report.page(KEPT)
    for text in [*HEAD, *(cell for row in ROWS for cell in row), RESULT.title, RESULT.what, RESULT.command,
                 RESULT.date, RESULT.commit, RESULT.machine, "torch 2.13.0", "(benchmarks/a.svg)"]:  # fmt: skip
        assert text in page


def test_bars_are_as_long_as_the_numbers() -> None:
    tree = ElementTree.fromstring(charts.svg(RESULT))
    bars = [node for node in tree.iter() if node.tag.endswith("rect")]
    assert [bar.get("class") for bar in bars] == ["bar", "bar", "ours", "ours", "ours", "ours"]
    lengths = [float(bar.get("width", "")) for bar in bars]
    peaks = [length for length, bar in zip(lengths, bars) if bar.get("x") == str(charts.LABEL)]
    assert [round(peak / peaks[0], 2) for peak in peaks] == [1, 0.25, 0.5]
    assert "out of memory" in [node.text for node in tree.iter()]


def test_marked_tables_are_filled() -> None:
    mark = "before\n<!-- benchmark: a; method; peak MB; image=512² -->\n"
    found = report.filled(f"{mark}old\nlines\n<!-- /benchmark -->\nafter <!-- x -->\n", KEPT)
    assert found == (
        f"{mark}\n"
        "| method | peak MB |\n| ------ | ------- |\n| eager  | 200     |\n| ours   | 50      |\n\n"
        "<!-- /benchmark -->\nafter <!-- x -->\n"
    )
    assert report.filled(found, KEPT) == found
    several = "<!-- benchmark: a; s; image=512²; method=ours; method=eager -->\n<!-- /benchmark -->"
    assert harness.table(["s"], [["4.0"], ["3.0"]]) in report.filled(several, KEPT)
    whole = report.filled("<!-- benchmark: a -->\n<!-- /benchmark -->", KEPT)
    assert harness.table(HEAD, ROWS) in whole


@pytest.mark.parametrize("mark", ["b", "a; peak", "a; image=64²", "a; size=512²", "a; image=512²; image=64²"])
def test_a_mark_that_names_nothing_is_an_error(mark: str) -> None:
    with pytest.raises((KeyError, ValueError), match=mark):
        report.filled(f"<!-- benchmark: {mark} -->\n<!-- /benchmark -->", KEPT)


def test_the_order_of_the_page(tmp_path: Path) -> None:
    for name in ("another", "streaming", "single_conv"):
        (tmp_path / f"{name}.json").write_text(json.dumps(asdict(replace(RESULT, title=name))), encoding="utf-8")
    assert [*report.results(tmp_path)] == ["single_conv", "streaming", "another"]


def test_every_script_that_publishes_is_run() -> None:
    """Each benchmark of report.py is there, and each script that keeps something is one of them."""
    publishing = {
        path.name
        for path in (ROOT / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "publish"
    }
    assert publishing == {script for script, *_ in report.BENCHMARKS.values()}


def test_page_charts_and_tables_are_in_step_with_what_was_kept() -> None:
    kept = report.results()
    for path in report.pages():
        text = path.read_text(encoding="utf-8")
        assert report.filled(text, kept) == text, f"{path.name}: run python benchmarks/report.py --page"
    if not kept:
        pytest.skip("docs/benchmarks/ has no figures yet: run python benchmarks/report.py")
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == report.page(kept)
    for name, result in kept.items():
        assert not result.bars or (harness.RESULTS / f"{name}.svg").read_text(encoding="utf-8") == charts.svg(result)


ON_GPU = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), "--device", "cpu", "--quick", "--no-tests"]


@pytest.mark.slow  # .ci/run makes all tables on toys
def test_a_table_of_a_gpu_has_a_row_for_each_of_its_cases(tmp_path: Path) -> None:
    command = [*ON_GPU, str(tmp_path), "--tables", "single_conv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = harness.Result(**json.loads((tmp_path / "single_conv.json").read_text(encoding="utf-8")))
    wanted = [[case.what, case.label] for case in cases.of_toys() if case.table == "single_conv"]
    assert [row[:2] for row in found.rows] == wanted
    place = {name: found.head.index(name) for name in ("ms", "largest error")}
    for row in found.rows:
        assert float(row[place["ms"]]) > 0
        assert 0 < float(row[place["largest error"]]) < 1e-5
    assert harness.table(found.head, found.rows) in (tmp_path / "single_conv.md").read_text(encoding="utf-8")


def test_every_table_of_a_gpu_is_tried_on_a_cpu() -> None:
    """Each with all of its methods, so that neither can rot."""
    toys, large = ({(case.table, case.method) for case in made()} for made in (cases.of_toys, cases.of_a_gpu))
    assert toys == large
    assert {table for table, _ in toys} == set(cases.ABOUT)


def test_a_case_without_time_is_a_row_that_says_so(tmp_path: Path) -> None:
    command = [*ON_GPU, str(tmp_path), "--minutes", "0", "--tables", "esrgan"]
    subprocess.run(command, capture_output=True, timeout=LIMIT, check=True)
    found = harness.Result(**json.loads((tmp_path / "esrgan.json").read_text(encoding="utf-8")))
    assert {row[2] for row in found.rows} == {"left out: no time was left"}
    assert len(found.rows) == len(cases.UPSCALE)


INTERRUPTED = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("begun", flush=True)
    time.sleep(10_000)
except KeyboardInterrupt:
    print("one failed")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal on Windows")
def test_tests_that_take_too_long_are_interrupted_so_that_they_say_what_failed() -> None:
    running = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"begun\n"
    assert on_gpu._ended(running, 0.01) is None
    assert running.stdout.read() == b"one failed\n"
    assert on_gpu._ended(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]), LIMIT) == 3


def test_a_case_that_ends_its_process_or_takes_too_long_is_a_row_of_its_own() -> None:
    (case, *_) = cases.of_toys()
    answers = "import sys; input(); print('{}', flush=True); input(); sys.exit(3)"
    one = process.Process([sys.executable, "-c", answers])
    assert [one.ask(case, LIMIT) for _ in range(2)] == [{}, {"error": "the process ended with 3"}]
    assert one.ask(case, LIMIT) == {}  # another one has begun
    one.end()
    slow = process.Process([sys.executable, "-c", "import time; time.sleep(10_000)"])
    assert slow.ask(case, 0.5) == {"error": "took longer than 0 s"}
    slow.end()


def test_without_diffusers_vaes_are_our_own_and_rows_say_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    one = work.Worker(torch.device("cpu"))
    toys = [case for case in cases.of_toys() if case.table in ("flux_decode", "wan")]
    found = {(case.table, case.method): one.run(case) for case in toys}
    assert 0 < found["flux_decode", "stream"]["errors"][0] < 1e-5
    assert found["flux_decode", "tiled"] == {"lacking": "diffusers is not installed here, which has the tiles"}
    (clips,) = {str(of_clip) for (table, _), of_clip in found.items() if table == "wan"}
    assert clips == "{'lacking': 'diffusers is not installed here, which has the network'}"


def test_tiles_of_a_function_of_pixels_are_the_whole() -> None:
    image = torch.rand(1, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    doubled = tiles.thrice(lambda part: part.repeat_interleave(2, 2).repeat_interleave(2, 3), image, 32, 8, 2)
    assert (doubled[..., ::2, ::2] - image).abs().max() < 1e-6
    halved = tiles.thrice(lambda part: part[..., ::2, ::2], image, 32, 8, 0.5)
    assert (halved - image[..., ::2, ::2]).abs().max() < 1e-6


@torch.inference_mode()
def test_the_widened_vae_computes_what_the_small_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    small = load_vae(SMALL_VAE)
    wide = widened.widened(small)
    assert wide.config["block_out_channels"] == (128, 256, 512, 512)
    latent = 4 * torch.randn(1, 4, 8, 8, generator=generator)
    image = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    for method, given in (("decode", latent), ("encode", image)):
        mine, theirs = (getattr(vae, method)(given, return_dict=False)[0] for vae in (wide, small))
        if method == "encode":
            mine, theirs = mine.parameters, theirs.parameters
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.inference_mode()
def test_the_widened_vae_is_written_as_hosts_read_it(tmp_path: Path) -> None:
    """By the names of Stable Diffusion's own code: the WebUI knows no others."""
    path = tmp_path / "vae.safetensors"
    widened.save(path, dtype=torch.float16)
    shapes = {name: shape for name, (_, shape) in read_header(path).items()}
    assert shapes["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert shapes["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert not [name for name in shapes if "_blocks." in name or "mid_block" in name]
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mine, theirs = (load_vae(file).decode(latent, return_dict=False)[0] for file in (path, SMALL_VAE))
    assert (mine - theirs).abs().max() <= 1e-2 * theirs.abs().max()  # in half precision


def test_a_vae_of_several_widths_is_not_widened() -> None:
    with pytest.raises(ValueError, match=r"\(32, 32, 64, 64\)"):
        widened.widened(small_vae())


def test_crops_are_pictures_of_the_size_asked_for() -> None:
    pictures = [torch.rand(3, 50, 70), torch.zeros(3, 40, 40)]
    made = train_vae.crops(pictures, 32, 5, torch.Generator().manual_seed(0))
    assert made.shape == (5, 3, 32, 32)
    assert -1 <= made.min() < made.max() <= 1


@pytest.mark.slow
def test_training_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    training = train_vae.Training(tmp_path, seconds=1e6)
    training.step([torch.rand(3, 80, 80)])
    training.save()
    again = train_vae.Training(tmp_path, seconds=1e6)
    assert (again.steps, again.elapsed) == (1, training.elapsed)
    for mine, theirs in zip(again.vae.parameters(), training.vae.parameters()):
        assert torch.equal(mine, theirs)
    assert load_vae(tmp_path / "vae.safetensors").config["block_out_channels"] == train_vae.WIDTHS


@torch.inference_mode()
def test_training_begins_with_mean_colours() -> None:
    vae: Any = train_vae.new_vae().eval()
    colour = torch.tensor([0.5, -0.5, 0.5])[None, :, None, None].expand(1, 3, 64, 64)
    latent = vae.encode(colour, return_dict=False)[0].mode()
    made = vae.decode(latent, return_dict=False)[0]
    assert (made - colour).abs().max() < 1e-3
