"""The report page: complete, self-contained, safe against names from a file, and its histograms count what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import edgemat
from edgemat import cli
from edgemat.errors import EdgematError
from edgemat.formats import Fixed
from edgemat.lower import read
from edgemat.nn import history as recorded
from edgemat.report import charts, write_report
from edgemat.report import history as stored
from edgemat.report.checkpoint import read_checkpoint
from edgemat.report.values import distribution, distributions, generated

VOID = {"meta", "br", "line", "rect", "circle", "polyline", "img"}


class Page(HTMLParser):
    """Checks that tags are closed and collects texts and everything that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            str(v) for k, v in attrs if k in ("src", "srcset", "data", "action") or (k == "href" and v[0] != "#")
        ]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        elif self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def self_contained(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == [] and not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    return page


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a lowered file, a checkpoint, a history, a front and samples."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
    q = edgemat.quantize(
        model, edgemat.Recipe(input="fixed<6,3>", weights="fixed<5>", activations="fixed<5>", accumulator=14)
    )
    x = torch.randn(96, 1, 8, 8)
    edgemat.calibrate(q, [x])
    history = edgemat.FormatHistory(q)
    front = edgemat.Front(folder / "front")
    for step in range(5):
        with torch.no_grad():
            q.get_submodule("0").weight_quantizer.frac.sub_(0.5)
        history.record(step * 10)
        front.offer(q, 0.5 + step / 10, 100.0 + 50 * step)
    history.save(folder / "history.json")
    edgemat.to_onnx(q.eval(), x[:2], folder / "net.onnx", name="net")
    torch.save({"state_dict": q.state_dict(), "global_step": 50, "log": history.state_dict()}, folder / "net.ckpt")
    np.save(folder / "x.npy", x.numpy())
    return folder


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.cli, ["report", *map(str, arguments)], standalone_mode=True)
    return done.exit_code, done.output


def test_everything_is_on_the_page(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    given = ("--inputs", trained / "x.npy", "--history", trained / "history.json", "--front", trained / "front")
    assert run(trained / "net.onnx", "-o", out, *given) == (0, f"{out}\n")
    page = self_contained(out)
    graph = read(trained / "net.onnx")
    for call in graph.nodes:
        assert call.name in page.texts
    for heading in (
        "Values",
        "Weights",
        "Binary points over time",
        "Accuracy and cost",
        "Arena of the C library",
        "Nodes",
    ):
        assert heading in page.texts
    assert "96 samples, given." in " ".join(page.texts) and "14 stated, " in " ".join(page.texts)
    assert page.tags.count("svg") >= 1 + len(graph.nodes) + 2 + 3
    history = json.loads((trained / "history.json").read_text())
    assert any(text.startswith("0.weight_quantizer: ") for text in page.texts) and len(history["quantisers"]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e39])
def test_infinities_are_said_on_the_page_and_on_stderr(value: float, trained: Path, tmp_path: Path) -> None:
    x = np.load(trained / "x.npy").astype(np.float64)
    np.save(tmp_path / "finite.npy", x)
    x[0, 0, 0, :3] = value
    np.save(tmp_path / "infinite.npy", x)
    said = f"holds 3 infinite of {x.size:,} values; each saturates at an end of fixed<6,3,RND,SAT>"
    for name, words in (("finite", ""), ("infinite", said)):
        arguments = ["report", trained / "net.onnx", "-o", tmp_path / "page.html", "--inputs", tmp_path / f"{name}.npy"]
        done = CliRunner().invoke(cli.cli, list(map(str, arguments)))
        assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'page.html'}\n")
        texts = " ".join(self_contained(tmp_path / "page.html").texts)
        assert words in texts and words in done.stderr and ("infinite" in texts + done.stderr) == bool(words)
    with pytest.warns(RuntimeWarning, match="3 infinite"):
        write_report(trained / "net.onnx", tmp_path / "page.html", np.load(tmp_path / "infinite.npy"))


def test_reading_a_file_never_imports_torch(trained: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from edgemat.report import write_report; "
        f"write_report({str(trained / 'net.onnx')!r}, {str(tmp_path / 'a.html')!r}, "
        f"history={str(trained / 'history.json')!r}, front={str(trained / 'front')!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_the_same_input_gives_the_same_page(trained: Path, tmp_path: Path) -> None:
    pages = [write_report(trained / "net.onnx", tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_a_checkpoint_alone(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert run(trained / "net.ckpt", "-o", out)[0] == 0
    page = self_contained(out)
    text = " ".join(page.texts)
    assert "0.weight_quantizer" in page.texts and "fixed<5,TRN_ZERO,SAT>" in text and "Binary points over time" in text
    found = read_checkpoint(trained / "net.ckpt")
    assert found.step == 50 and set(found.weights) == {"0", "4"} and len(found.history) == 4
    weights = next(f for f in found.formats if f.name == "0.weight_quantizer")
    assert weights.fracs.shape == (8,) and weights.calibrated


def test_histograms_count_every_value(trained: Path) -> None:
    graph = read(trained / "net.onnx")
    x = np.load(trained / "x.npy")
    tensors, weights = distributions(graph, x)
    codes = edgemat.Simulator(trained / "net.onnx").trace(x)
    names = [graph.inputs[0], *(call.outputs[0] for call in graph.nodes)]
    assert len(tensors) == len(names)
    for name, entry in zip(names, tensors, strict=True):
        fmt = graph.tensors[name].format
        values = codes[name] * np.ldexp(1.0, -np.array(fmt.fracs)).reshape([-1] + [1] * (codes[name].ndim - 2))
        assert entry.counts.sum() == entry.count == values.size
        assert (entry.low, entry.high) == (values.min(), values.max())
        assert entry.zeros == (codes[name] == 0).mean()
        inner = [((values >= a) & (values < b)).sum() for a, b in zip(entry.edges[:-1], entry.edges[1:], strict=True)]
        np.testing.assert_array_equal(entry.counts, inner)
    for entry, call in zip(weights, (c for c in graph.nodes if c.constant(1) is not None), strict=True):
        assert entry.name == call.name and entry.counts.sum() == call.constant(1).size


@pytest.mark.parametrize(
    ("fmt", "codes", "at_rails", "spare"),
    [
        ("fixed<4,4>", [-8, 7, 0, 3], 0.5, 0),
        ("fixed<4,4>", [-2, 1, 0, 0], 0.0, 2),
        ("ufixed<4,4>", [0, 0, 15, 1], 0.25, 0),
        ("ufixed<4,4>", [0, 0, 0, 0], 0.0, 4),
        ("fixed<4,4,TRN,WRAP>", [-8, 7, 0, 3], None, 0),
        ("fixed<4,4,RND,SAT_SYM>", [-7, 7, 0, 3], 0.5, 0),
    ],
)
def test_rails_and_spare_bits(fmt: str, codes: list[int], at_rails: float | None, spare: int) -> None:
    found = distribution("x", "", np.array([codes]), Fixed.parse(fmt), 1, True)
    assert (found.at_rails, found.spare_bits) == (at_rails, spare)


def test_rails_by_channel() -> None:
    fmt = Fixed.parse("fixed<[4,2,0],[4,2,1]>")
    found = distribution("x", "", np.array([[7, 1, 0], [6, -2, 0], [1, 0, 0]]), fmt, 1, True)
    assert found.at_rails == 3 / 9 and found.rails == (-8.0, 7.0)


def test_generated_inputs_reach_both_ends(trained: Path) -> None:
    graph = read(trained / "net.onnx")
    (codes,) = generated(graph).values()
    assert (codes.min(), codes.max()) == (-32, 31) and codes.shape == (128, 1, 8, 8)


def test_names_from_a_file_are_text(tmp_path: Path) -> None:
    evil = "</text><script>alert(1)</script>\"'&"
    line = charts.Line(evil, [0.0, 1.0], [1.0, 2.0])
    pictures = [
        charts.lines([line], evil, evil),
        charts.histogram(np.array([0.0, 1.0]), np.array([3]), (0.0, 1.0), evil),
        charts.front([(1.0, 0.5, evil), (100.0, 0.7, evil)], evil),
        charts.arena([charts.Block("x" + evil, 0, 9, 0, 90)], 10, 100, evil),
    ]
    for picture in pictures:
        assert "<script" not in picture and "&lt;script&gt;" in picture
    (tmp_path / "front.json").write_text(json.dumps({"points": [{"cost": 1, "accuracy": 0.5, "file": evil}]}))
    from tests.core.graphs import residual

    (tmp_path / "net.onnx").write_bytes(__import__("onnx_ir").to_proto(residual().finished()).SerializeToString())
    write_report(tmp_path / "net.onnx", tmp_path / "a.html", front=tmp_path)
    assert "script" not in self_contained(tmp_path / "a.html").tags


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 1e6), (1e-9, 2e-9), (-0.37, 0.11), (5.0, 5.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high, 5)
    assert all(low - 1e-9 * abs(low) <= v <= high + 1e-9 * abs(high) for v in found)
    assert (len(found) == 0) == (low == high) and len(found) <= 7
    assert all(charts.number(v) for v in found)


def test_history_survives_files_and_resumes(trained: Path, tmp_path: Path) -> None:
    assert (recorded.KIND, recorded.VERSION) == (stored.KIND, stored.VERSION)
    q = edgemat.quantize(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), verbose=False)
    history = edgemat.FormatHistory(q)
    history.record(0)
    edgemat.calibrate(q, [torch.randn(8, 4)])
    history.record(5)
    with pytest.raises(EdgematError, match="step 5 after step 5"):
        history.record(5)
    other = edgemat.FormatHistory(q)
    other.load_state_dict(json.loads(json.dumps(history.state_dict())))
    other.record(6)
    other.save(tmp_path / "h.json")
    series = {s.name: s for s in stored.read_history(tmp_path / "h.json")}
    weights = series["0.weight_quantizer"]
    fracs = q.get_submodule("0").weight_quantizer.format.fracs
    assert weights.steps == (5.0, 6.0) and weights.frac == (sum(fracs) / 3,) * 2 and weights.width == (8.0, 8.0)
    with pytest.raises(EdgematError, match="in one of network and history only"):
        edgemat.FormatHistory(edgemat.nn.QuantLinear(2, 2)).load_state_dict(other.state_dict())
    with pytest.raises(EdgematError, match="no quantiser"):
        edgemat.FormatHistory(nn.Linear(2, 2))


def test_csv_logs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,loss,formats/a.b/width,formats/a.b/frac_bits,formats/c/width,formats/c/frac_bits_mean\n"
        "0,9,,6,3,5,1.5\n0,9,0.5,,,,\n0,19,,6,4,5,1.25\n"
    )
    found = {s.name: s for s in stored.read_history(path)}
    assert found["a.b"].steps == (9.0, 19.0) and found["a.b"].frac == (3.0, 4.0) and found["c"].frac == (1.5, 1.25)


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("--history", "{}", "holds no formats over time"),
        ("--history", '{"kind": "edgemat format history", "steps": [1], "quantisers": {"a": []}}', "holds no formats"),
        ("--history", "a,b\n1,2\n", "holds no formats over time"),
        ("--history", "step,formats/a/width,formats/a/frac_bits\nx,1,2\n", "holds no formats over time"),
        ("--front", "[]", "is no front"),
        ("--front", '{"points": []}', "no points"),
        ("--front", '{"points": [{"cost": NaN, "accuracy": 1, "file": ""}]}', "no points with finite"),
    ],
)
def test_other_files_are_refused_in_one_sentence(
    trained: Path, tmp_path: Path, option: str, text: str, words: str
) -> None:
    (tmp_path / "given").write_text(text)
    with pytest.raises(EdgematError) as caught:
        write_report(trained / "net.onnx", tmp_path / "a.html", **{option[2:]: tmp_path / "given"})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["given"]


def test_models_and_places_that_cannot_be(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "float.pt")
    for model, words in (
        ("text", "not"),
        ("module.pt", "cannot be read as a checkpoint"),
        ("float.pt", "no quantiser"),
    ):
        with pytest.raises(EdgematError, match=words):
            write_report(tmp_path / model, tmp_path / "a.html")
    with pytest.raises(EdgematError, match="is a folder"):
        write_report(trained / "net.onnx", tmp_path)
    with pytest.raises(EdgematError, match="cannot be written"):
        write_report(trained / "net.onnx", tmp_path / "nowhere" / "a.html")
    with pytest.raises(EdgematError, match="give inputs with a lowered file"):
        write_report(trained / "net.ckpt", tmp_path / "a.html", np.zeros((1, 2), np.float32))
    with pytest.raises(EdgematError, match="samples, expected"):
        write_report(trained / "net.onnx", tmp_path / "a.html", np.zeros((0, 1, 8, 8), np.float32))
    model = tmp_path / "own.onnx"
    model.write_bytes((trained / "net.onnx").read_bytes())
    with pytest.raises(EdgematError, match=r"would replace .*own\.onnx, which it is made from"):
        write_report(model, tmp_path / "." / "own.onnx")
    assert model.read_bytes() == (trained / "net.onnx").read_bytes()
    (tmp_path / "kept.html").write_text("old")
    with pytest.raises(EdgematError):
        write_report(tmp_path / "text", tmp_path / "kept.html")
    assert (tmp_path / "kept.html").read_text() == "old" and not list(tmp_path.glob(".*"))
    assert run(trained / "net.onnx", "-o", tmp_path / "b.html", "--codes")[0] == 2
