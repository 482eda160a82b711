"""The page of an evaluation: whole, self-contained, with the figures in it."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from torchrl_vla.evaluation.comparison import compare
from torchrl_vla.evaluation.curves import run_charts
from torchrl_vla.evaluation.html import write_html
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport

_VOID = {"meta", "br"}


class _Page(HTMLParser):
    """Checks that tags are closed in order; collects text and what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def make_report(*successes: bool, checkpoint: str) -> EvaluationReport:
    episodes = [
        EpisodeResult(task, state, success, 80 if success else 220, 10 if success else 28)
        for task in (0, 3)
        for state, success in enumerate(successes)
    ]
    instructions = {0: 'push <script>alert("0")</script> & pull', 3: "pick"}
    settings = {"checkpoint": checkpoint, "greedy": True, "horizon": 220, "fidelity": "exact", "temperature": 0.0}
    settings |= {"init_states": "the official ones, in order", "versions": {"mujoco": "3.3.2"}, "command": ["run"]}
    return EvaluationReport("libero_spatial", instructions, episodes, 12.0, settings)


def test_the_page_has_the_figures_and_needs_nothing_else(tmp_path: Path):
    report = make_report(True, True, False, checkpoint="runs/<b>/policy")
    film = tmp_path / "film.mp4"
    film.write_bytes(b"\x00\x00film")
    write_html(tmp_path / "report.html", report, films=[(report.episodes[2], film)])
    page = read(tmp_path / "report.html")
    assert "66.7%" in page.text and "4 of 6 episodes succeeded; the 95% interval is 30.0 to 90.3%." in page.text
    assert "2 / 3" in page.text and "20.8 to 93.9" in page.text and "127" in page.text and "2.00" in page.text
    assert "the official ones, in order" in page.text and "3.3.2" in page.text and "runs/<b>/policy" in page.text
    assert 'push <script>alert("0")</script> & pull' in page.text and not page.find("script")
    encoded = base64.b64encode(b"\x00\x00film").decode()
    assert page.find("video")[0]["src"] == f"data:video/mp4;base64,{encoded}"
    assert "failure after 220 steps" in page.text and page.find("meta")[1]["name"] == "viewport"
    # Nothing is fetched: no link, no source but the film, no style from elsewhere.
    assert not page.find("link") and not page.find("img") and "url(" not in page.text and "http" not in page.text
    assert [attributes for _, attributes in page.tags if "src" in attributes] == page.find("video")


def test_bars_are_as_long_as_the_rates(tmp_path: Path):
    report = make_report(True, True, False, False, checkpoint="new")
    baseline = make_report(True, False, False, False, checkpoint="old & worse")
    write_html(tmp_path / "plain.html", report)
    widths = [bar["width"] for bar in read(tmp_path / "plain.html").find("rect")]
    assert widths == ["100%", "50.00%"] * 3
    write_html(tmp_path / "compared.html", report, comparison=compare(baseline, report))
    page = read(tmp_path / "compared.html")
    assert [bar["width"] for bar in page.find("rect")][2:6] == ["100%", "50.00%", "100%", "25.00%"]
    assert "+25.0 points" in page.text and "2 were gained and 0 lost" in page.text and "old & worse" in page.text


def test_learning_curves_of_the_run(tmp_path: Path):
    policy = tmp_path / "run" / "policy"
    policy.mkdir(parents=True)
    assert run_charts(str(policy)) == []
    (tmp_path / "run" / "metrics.csv").write_text(
        "update,env_steps,rollout/success_rate,val/success_rate\n0,0,,0.5\n1,1000,0.25,\n2,2000,nan,0.75\n"
    )
    (chart,) = run_charts(str(policy))
    assert [curve.points for curve in chart.curves] == [[(1000.0, 0.25)], [(0.0, 0.5), (2000.0, 0.75)]]
    write_html(tmp_path / "report.html", make_report(True, checkpoint="x"), charts=[chart])
    page = read(tmp_path / "report.html")
    lines = [line["points"] for line in page.find("polyline")]
    assert lines == ["50.00,75.00", "0.00,50.00 100.00,25.00"]
    assert "validation: 75.0% after 2,000 control steps" in page.text


def test_a_checkpoint_that_is_no_folder_has_no_learning_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the folder of a run: a path of that name would lie below it."""
    (tmp_path / "metrics.csv").write_text("update,env_steps,val/success_rate\n1,1000,0.25\n")
    monkeypatch.chdir(tmp_path)
    assert run_charts("bundled:tiny") == [] and run_charts("someone/openvla") == []
    assert len(run_charts(".")) == 1


@pytest.mark.parametrize(("values", "labels"), [((0.02, 0.3), ["0", "0.1", "0.2", "0.3"]), ((0.0,), ["0"])])
def test_axes_of_figures_that_are_no_shares(tmp_path: Path, values: tuple[float, ...], labels: list[str]):
    rows = "".join(f"{step},{step},{value}\n" for step, value in enumerate(values))
    (tmp_path / "metrics.csv").write_text(f"update,env_steps,val/l1\n{rows}")
    (chart,) = run_charts(str(tmp_path))
    write_html(tmp_path / "report.html", make_report(True, checkpoint="x"), charts=[chart])
    text = (tmp_path / "report.html").read_text()
    assert chart.steps == "optimizer steps"
    for label in labels:
        assert f'text-anchor="end">{label}</text>' in text
