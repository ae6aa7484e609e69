"""report.html: what it says, what it escapes, and that it needs nothing from anywhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.zoo import ZOO
from zeroskip import compile_sparse
from zeroskip.ir.errors import ArtifactError
from zeroskip.linear_table import layer_of, role_of
from zeroskip.passes import ApplyMasks, Observe, PruneSparseGPT, PruneWanda
from zeroskip.report_markup import Markup, prose, tag
from zeroskip.report_page import report_page, write_report_page
from zeroskip.report_plots import short, ticks
from zeroskip.report_speed import speed_verdict, weight_bytes

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>\'"&'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def linear(layer: int, part: str, **changed: Any) -> dict[str, Any]:
    return {
        "name": f"model.layers.{layer}.{part}.weight",
        "shape": [64, 128],
        "pattern": "2:4",
        "density": 0.5,
        "note": "",
        "verdict": None,
        "dtype": "float32",
        "error": 0.1 + layer / 100,
        "change": 0.3,
        **changed,
    }


def verdict(choice: str, speeds: dict[str, float], reason: str) -> dict[str, Any]:
    return {
        "choice": choice,
        "speedup": speeds,
        "reason": reason,
        "source": "measured",
        "rival": "ONNX Runtime",
        "threads": 2,
    }


def report(linears: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    steps = [("observe", {"gram": True}, None), ("prune-sparsegpt", {"pattern": "2:4"}, 0.25)]
    return {
        "passes": [
            {"name": n, "options": o, "stages": 2, "seconds": 1.5, "modified": True, "drift": d}
            for n, o, d in steps
        ],
        "linears": linears,
        "scale_groups": [],
        "stages": [],
        "seconds": 4.0,
        "drift": 0.3,
        "density": 0.5,
        "histograms": [
            {"role": "mlp.up", "linears": 2, "before": [1] * 64, "after": [1] * 20 + [0] * 44}
        ],
        **changed,
    }


class Page(HTMLParser):
    """Reads a page, and fails where elements do not nest."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def usual_page(tmp_path: Path) -> str:
    linears = [linear(k, part) for k in range(3) for part in ("attn.q", "mlp.up")]
    return report_page(report(linears), folder=tmp_path, model="tiny")


def test_it_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    text = usual_page(tmp_path)
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not {name for name in page.attributes if name.startswith("on") or name == "src"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert "default-src &#x27;none&#x27;" in text
    assert {"svg", "title", "table", "caption", "style"} <= page.tags


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    one = linear(
        0,
        HOSTILE,
        note=HOSTILE,
        pattern=HOSTILE,
        verdict=verdict("dense", {"1": 0.5}, HOSTILE) | {"rival": HOSTILE},
    )
    document = report([one, linear(1, HOSTILE)])
    document["passes"][0] |= {"name": HOSTILE, "options": {HOSTILE: HOSTILE}}
    document["histograms"][0]["role"] = HOSTILE
    gate = {"name": HOSTILE, "passed": False, "limit": HOSTILE, "measured": 2, "detail": HOSTILE}
    text = report_page(
        document,
        folder=tmp_path,
        model=HOSTILE,
        gates=[{**gate, "costliest": [HOSTILE], "unit": HOSTILE}],
        recipe=HOSTILE,
    )
    page = Page(text)
    assert not page.tags & {"script", "img"}
    assert "onerror" not in page.attributes
    assert page.words.count('<script>alert("1")</script>') > 10


def test_markup_is_made_by_tag_alone() -> None:
    assert tag("p", "<b>", Markup("<b></b>"), None, title='"') == (
        '<p title="&quot;">&lt;b&gt;<b></b></p>'
    )
    assert prose("run `zeroskip <x>` now") == "run <code>zeroskip &lt;x&gt;</code> now"


def test_every_linear_that_stays_dense_has_its_reason(tmp_path: Path) -> None:
    linears = [
        linear(0, "mlp.up", verdict=verdict("sparse", {"1": 1.8, "128": 1.1}, "1.4x on average")),
        linear(1, "mlp.up", verdict=verdict("dense", {"1": 0.71}, "0.71x at m=1")),
        linear(2, "mlp.up", verdict=verdict("dense", {"1": 0.84}, "0.84x at m=1")),
        linear(0, "mlp.down", note="it is excluded"),
        linear(0, "attn.q"),
        linear(0, "router", pattern="dense", density=1.0, note="router"),
    ]
    words = Page(report_page(report(linears), folder=tmp_path)).words
    assert "0.71-0.84x at m=1" in words
    for reason in ("it is excluded", "no pass of the recipe lowers it", "router"):
        assert reason in words
    assert "1 of 3 linears run sparse, 1.10x to 1.80x as fast as dense" in words


def test_what_was_lowered_unasked_is_not_called_fast() -> None:
    class_, value, words = speed_verdict([linear(0, "x", note="zeroskip::sparse_linear")])
    assert (class_, value) == ("", "not measured")
    assert "1 linears run sparse because the recipe says so" in words


@pytest.mark.parametrize(
    ("verdicts", "class_", "words"),
    [
        ([None], "", "not asked"),
        ([verdict("dense", {"1": 0.5}, "slow")], "bad", "all of them run dense"),
        ([verdict("sparse", {"1": 1.5}, "fast")], "good", "1 of 1 linears run sparse"),
    ],
)
def test_the_verdict_on_speed_is_plain(verdicts: list[Any], class_: str, words: str) -> None:
    found = speed_verdict([linear(0, "x", verdict=each) for each in verdicts])
    assert found[0] == class_
    assert words in found[2]


def test_bytes_are_honest() -> None:
    dense = 64 * 128 * 4
    packed = dense // 2 + 64 * 16 + 8 * 65
    one = linear(0, "x")
    assert weight_bytes([one]) == (dense, packed)
    head = linear(0, "y", pattern="dense", density=1.0)
    assert weight_bytes([one, head]) == (2 * dense, packed + dense)
    # Packing what keeps nearly everything would not pay.
    assert weight_bytes([linear(0, "x", density=0.99)]) == (dense, dense)
    assert weight_bytes([linear(0, "x", dtype="")]) is None


def test_without_statistics_the_change_of_weights_is_shown(tmp_path: Path) -> None:
    linears = [linear(k, "mlp.up", error=None) for k in range(2)]
    words = Page(report_page(report(linears), folder=tmp_path)).words
    assert "Change of the weights by layer" in words
    assert "put observe before the pruner" in words
    assert "Error by layer" not in words


def test_gates_and_the_curve_of_an_elastic_artefact(tmp_path: Path) -> None:
    points = [
        {"sparsity": s, "bytes": 1000, "perplexity": 30 + 9 * s, "latency": None} for s in (0, 0.5)
    ]
    (tmp_path / "elastic.json").write_text(json.dumps({"curve": points}), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("passes: [observe]\n", encoding="utf-8")
    gate = {
        "name": "max_perplexity_increase",
        "limit": 1.1,
        "measured": 1.3,
        "unit": "times",
        "passed": False,
        "detail": "perplexity 39 against 30",
        "costliest": ["layers.0: 40 %"],
        "perplexity": 39.0,
        "dense_perplexity": 30.0,
    }
    document = report([linear(0, "mlp.up"), linear(1, "mlp.up")])
    path = write_report_page(tmp_path, document, model="tiny", gates=[gate])
    words = Page(path.read_text(encoding="utf-8")).words
    for text in ("1 of 1 gates failed", "39.00", "dense: 30.00", "layers.0: 40 %", "34.5000"):
        assert text in words
    assert "passes: [observe]" in words
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    (tmp_path / "elastic.json").write_text("{", encoding="utf-8")
    assert "Perplexity against density" not in Page(report_page(document, folder=tmp_path)).words


def test_nothing_pruned_and_nothing_numbered(tmp_path: Path) -> None:
    bare = linear(0, "x", pattern="dense", density=1.0, error=None, change=None, note="head")
    words = Page(
        report_page(report([bare | {"name": "head"}], histograms=[], passes=[]), folder=tmp_path)
    ).words
    assert "No linear was pruned." in words
    assert "nothing pruned" in words
    Page(report_page(report([]), folder=tmp_path))


def test_a_large_model_makes_no_large_page(tmp_path: Path) -> None:
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    linears = [linear(k, f"mlp.{part}") for k in range(32) for part in parts]
    experts = [linear(k, f"experts[{e}]") for k in range(32) for e in range(128)]
    for each in (linears, linears + experts):
        assert len(report_page(report(each), folder=tmp_path)) < 1_000_000


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"report\.html cannot be written") as raised:
        write_report_page(tmp_path / "absent", report([linear(0, "x")]))
    assert raised.value.next_step


def test_what_a_linear_is_in_its_layer() -> None:
    assert role_of("model.layers.3.self_attn.q_proj.weight") == "self_attn.q_proj"
    assert role_of("layers.3.experts.7.w1.weight") == "experts.*.w1"
    assert role_of("layers.3.experts[7]") == "experts[*]"
    assert role_of("lm_head.weight") == "lm_head"
    assert role_of("fc1.weight") == "fc1"
    assert (layer_of("h.11.mlp.c_fc"), layer_of("fc1.weight")) == (11, None)


def test_round_numbers() -> None:
    assert ticks(0.53, 2) == [0, 0.25, 0.5]
    assert ticks(110, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(0, 3) == [0]
    assert [short(x) for x in (0, 0.12345, 12.345, 1234.5)] == ["0", "0.123", "12.3", "1,234"]


def test_a_real_compilation_fills_it(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    batches = [entry.inputs(2, 12), entry.inputs(3, 9)]

    def made(*passes: Any) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = compile_sparse(
                entry.model(), passes, example_inputs=entry.inputs(), calibration=batches
            )
        document: dict[str, Any] = json.loads(json.dumps(found.report.to_json()))
        return document

    wanda = made(Observe(gram=True), PruneWanda("2:4"), ApplyMasks())
    gpt = made(Observe(gram=True), PruneSparseGPT("2:4"))
    for document in (wanda, gpt):
        pruned = [each for each in document["linears"] if each["pattern"] == "2:4"]
        assert pruned
        assert all(0 < each["error"] < each["change"] for each in pruned)
    # Kept weights that take over make the error less, and move the weights further.
    assert gpt["linears"][0]["error"] < wanda["linears"][0]["error"]
    assert gpt["linears"][0]["change"] > wanda["linears"][0]["change"]
    spread = next(each for each in wanda["histograms"] if each["role"] == "mlp.up_proj")
    assert spread["linears"] == 2
    assert sum(spread["after"]) * 2 == sum(spread["before"])
    path = write_report_page(tmp_path, wanda, model="tiny")
    words = Page(path.read_text(encoding="utf-8")).words
    assert "computed with the Gram matrix of its inputs" in words
    assert "tiny, pruned to 2:4" in words


def browse(path: Path, work: Path) -> tuple[str, str, set[str]]:
    """Opens a page in Chromium: the document, what it said, and what the page asked for."""
    assert CHROMIUM is not None
    work.mkdir()
    log = work / "net.json"
    command = [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", "--window-size=800,1600", "--dump-dom"),
        f"--user-data-dir={work / 'profile'}",
        f"--log-net-log={log}",
        f"--screenshot={work / 'shot.png'}",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    # The browser asks for updates of its own; what a page asks for is known by where that came from.
    own = [
        line
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if '"network_isolation_key":"file://' in line
    ]
    asked = set(re.findall(r'"url":"((?:https?|wss?):[^"]+)"', "\n".join(own)))
    return done.stdout, done.stderr, asked


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_without_a_word_and_without_a_request(tmp_path: Path) -> None:
    path = tmp_path / "report page.html"
    path.write_text(usual_page(tmp_path), encoding="utf-8")
    text, said, asked = browse(path, tmp_path / "browser")
    assert ":CONSOLE" not in said, said
    assert asked == set()
    page = Page(re.sub(r"^<!doctype html>\s*", "", text, flags=re.IGNORECASE))
    assert {"svg", "rect", "polyline", "circle", "path"} <= page.tags
    assert "Density by layer" in page.words
    assert (tmp_path / "browser" / "shot.png").stat().st_size > 20_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_browser_would_have_told(tmp_path: Path) -> None:
    path = tmp_path / "other.html"
    path.write_text(
        "<img src='http://example.invalid/x.png'><script>nothing.there</script>", encoding="utf-8"
    )
    _, said, asked = browse(path, tmp_path / "browser")
    assert asked == {"http://example.invalid/x.png"}
    assert ":CONSOLE" in said
