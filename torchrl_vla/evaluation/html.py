"""An evaluation as one page that needs nothing else: style, charts and films are in it, and no script."""

from __future__ import annotations

import base64
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torchrl_vla.evaluation.charts import interval_bar, learning_curves
from torchrl_vla.evaluation.comparison import Comparison
from torchrl_vla.evaluation.curves import Chart
from torchrl_vla.evaluation.report import EpisodeResult, EvaluationReport, SuccessRate, TaskResult
from torchrl_vla.files import whole_file

__all__ = ["write_html"]


def write_html(
    path: Path,
    report: EvaluationReport,
    *,
    comparison: Comparison | None = None,
    films: Sequence[tuple[EpisodeResult, Path]] = (),
    charts: Sequence[Chart] = (),
) -> None:
    """Write the page.

    Args:
        path: the file; its folder is there.
        report: the evaluation.
        comparison: of this evaluation with another one.
        films: MP4 files of episodes, copied into the page.
        charts: learning curves of the run that the policy comes from.
    """
    style = importlib.resources.files("torchrl_vla").joinpath("assets/report.css").read_text(encoding="utf-8")
    sections = [
        _headline(report),
        _comparison(comparison) if comparison else "",
        _tasks(report, comparison),
        *(
            _section(chart.title, learning_curves(chart.curves, percent=chart.percent, steps=chart.steps))
            for chart in charts
        ),
        _films(films, report) if films else "",
        _protocol(report),
        _settings(report),
    ]
    title = f"{report.task_suite}: {report.total.rate:.1%} success"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        f'<header><p class="eyebrow">Evaluation of a vision-language-action policy</p><h1>{escape(report.task_suite)}'
        f'</h1><p class="soft"><code>{escape(str(report.settings.get("checkpoint", "")))}</code></p></header>\n'
        f"<main>\n{''.join(section for section in sections if section)}</main>\n</body></html>\n"
    )
    with whole_file(path) as partial:
        # A path's bytes may be no UTF-8.
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>\n"


def _points(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def _range(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _headline(report: EvaluationReport) -> str:
    total, figures = report.total, report.figures()
    facts = {
        "episodes": f"{total.episodes}",
        "mean length": f"{figures['mean_length']:.0f} control steps",
        "decisions per episode": f"{figures['decisions_per_episode']:.1f}",
        "seconds per episode": f"{figures['seconds_per_episode']:.2f}",
    }
    return (
        '<section class="headline"><div>'
        f'<p class="rate">{100 * total.rate:.1f}<small>%</small></p>'
        f"<p>{total.successes} of {total.episodes} episodes succeeded; the 95% interval is {_range(total.interval)}%."
        f"</p>{interval_bar([total], f'Success {total}')}</div>"
        f'<dl class="facts">{_pairs(facts.items())}</dl></section>\n'
    )


def _pairs(items: Iterable[tuple[str, str]]) -> str:
    """Terms and descriptions."""
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in items)


def _tasks(report: EvaluationReport, comparison: Comparison | None) -> str:
    rows = []
    for task, result in report.tasks.items():
        rates, text = [result.success], _points(result.success.rate)
        if comparison and task in comparison.tasks:
            rates.append(comparison.tasks[task].baseline)
            text += f" <small>baseline {_points(rates[1].rate)}</small>"
        label = f"Task {task}: {' against '.join(map(str, rates))}"
        rows.append(
            f'<li><div class="what"><span><span class="soft">{task}</span>&ensp;{escape(report.instructions[task])}'
            f"</span><b>{text}</b></div>{interval_bar(rates, label)}</li>"
        )
    legend = ""
    if comparison:
        legend = (
            '<ul class="legend"><li><i style="background:var(--first)"></i>this policy</li>'
            f'<li><i style="background:var(--second)"></i>{escape(comparison.baseline_name)}</li></ul>'
        )
    axis = '<div class="axis"><span>0</span><span>25</span><span>50</span><span>75</span><span>100%</span></div>'
    return _section(
        "Success by task, with 95% intervals",
        f'{legend}<ul class="bars">{"".join(rows)}</ul>{axis}\n{_task_table(report)}',
    )


def _task_table(report: EvaluationReport) -> str:
    def row(name: str, result: TaskResult) -> str:
        rate: SuccessRate = result.success
        cells = (
            f"{rate.successes} / {rate.episodes}",
            _points(rate.rate),
            _range(rate.interval),
            f"{result.mean_length:.0f}",
            f"{result.decisions:.1f}",
        )
        return f'<tr><th scope="row">{name}</th>{"".join(f"<td class=number>{cell}</td>" for cell in cells)}</tr>'

    head = "".join(
        f'<th scope="col" class="number">{name}</th>'
        for name in ("succeeded", "rate", "95% interval", "mean length", "decisions")
    )
    body = "".join(
        row(f'{task}<span class="wide">&ensp;{escape(report.instructions[task])}</span>', result)
        for task, result in report.tasks.items()
    )
    return (
        '<div class="table" style="margin-top:1.6rem"><table>'
        f'<thead><tr><th scope="col">task</th>{head}</tr></thead><tbody>{body}</tbody>'
        f"<tfoot>{row('all', TaskResult.of(report.episodes))}</tfoot></table></div>"
    )


def _comparison(comparison: Comparison) -> str:
    total = comparison.total
    tone = "good" if total.interval[0] > 0 else "bad" if total.interval[1] < 0 else ""
    tested = (
        f"Of the {total.gained + total.lost} episodes that ended differently, {total.gained} were gained and "
        f"{total.lost} lost; McNemar's exact test, two-sided, gives p&nbsp;=&nbsp;{total.p_value:.2g}."
    )
    left_out = f"<p>{comparison.left_out}</p>" if comparison.unpaired else ""
    rows = "".join(
        f'<tr><th scope="row">{task}</th>'
        + "".join(
            f'<td class="number">{cell}</td>'
            for cell in (
                _points(one.baseline.rate),
                _points(one.new.rate),
                f"{100 * one.difference:+.1f}",
                _range(one.interval),
                one.gained,
                one.lost,
                f"{one.p_value:.2g}",
            )
        )
        + "</tr>"
        for task, one in [*comparison.tasks.items(), ("all", total)]
    )
    head = "".join(
        f'<th scope="col" class="number">{name}</th>'
        for name in ("baseline", "this", "points", "95% interval", "gained", "lost", "p")
    )
    return _section(
        "Compared on the same initial states",
        f'<p>Against <code>{escape(comparison.baseline_name)}</code>: <span class="{tone}">'
        f"{100 * total.difference:+.1f} points</span> (95% interval {_range(total.interval)}), from "
        f"{_points(total.baseline.rate)} to {_points(total.new.rate)} on {total.episodes} paired episodes. {tested}</p>"
        f'{left_out}<div class="table"><table><thead><tr><th scope="col">task</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
    )


def _films(films: Sequence[tuple[EpisodeResult, Path]], report: EvaluationReport) -> str:
    figures = []
    for episode, path in films:
        data = base64.b64encode(path.read_bytes()).decode()
        outcome = '<span class="good">success</span>' if episode.success else '<span class="bad">failure</span>'
        figures.append(
            '<figure><video controls muted loop playsinline preload="metadata" '
            f'src="data:video/mp4;base64,{data}"></video><figcaption>{outcome} after {episode.control_steps} steps '
            f'<span class="soft">&middot; task {episode.task_id}, state {episode.init_state_id}</span><br>'
            f"{escape(report.instructions[episode.task_id])}</figcaption></figure>"
        )
    return _section(
        "Videos",
        '<p class="soft small">The first success and the first failure of each task, at twice the speed.</p>'
        f'<div class="videos">{"".join(figures)}</div>',
    )


def _protocol(report: EvaluationReport) -> str:
    settings = report.settings
    per_task = sorted({result.success.episodes for result in report.tasks.values()})
    episodes = f"{per_task[0]}" if len(per_task) == 1 else f"{per_task[0]} to {per_task[-1]}"
    temperature = settings.get("temperature")
    acting = "The policy acts greedily." if settings.get("greedy") else f"Actions are sampled at {temperature}."
    sentences = [
        f"{len(report.tasks)} tasks of {report.task_suite}, {episodes} episodes each.",
        f"Initial states: {settings.get('init_states', 'not noted')}.",
        acting,
        f"An episode ends when LIBERO's goal holds, or without success after {settings.get('horizon')} control steps "
        "of 1/20 s; objects settle for 10 steps first.",
        "Simulation and pictures are stock LIBERO's to the bit."
        if settings.get("fidelity") == "exact"
        else "Simulation and pictures are cheaper than stock LIBERO's: rates are not comparable with published ones.",
        "Intervals are Wilson's, 95%.",
        *([] if report.caveat is None else [report.caveat]),
    ]
    return _section("Protocol", f"<p>{escape(' '.join(sentences))}</p>")


def _settings(report: EvaluationReport) -> str:
    settings: Mapping[str, Any] = report.settings
    versions = settings.get("versions", {})
    shown = {name: value for name, value in settings.items() if name not in ("versions", "command")}
    command = settings.get("command")
    run = f"<p><code>{escape(' '.join(map(str, command)))}</code></p>" if command else ""
    return (
        "<section><details open><summary>Configuration and versions</summary>"
        f'{run}<dl class="pairs">{_rows(shown)}</dl>'
        f'<h2>Versions</h2><dl class="pairs">{_rows(versions)}</dl></details></section>\n'
    )


def _rows(entries: Mapping[str, Any]) -> str:
    return "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in entries.items())
