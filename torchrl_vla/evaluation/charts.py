"""Charts as inline SVG that follows the width of the page, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from torchrl_vla.evaluation.report import SuccessRate

__all__ = ["Curve", "interval_bar", "learning_curves"]

_COLOURS = ("var(--first)", "var(--second)")
_BAR_HEIGHT, _BAR_GAP = 14, 5


@dataclass(frozen=True)
class Curve:
    """A figure over the course of a run.

    Args:
        label: what it is.
        points: (steps, value), in order of the steps.
    """

    label: str
    points: Sequence[tuple[float, float]]


def interval_bar(rates: Sequence[SuccessRate], label: str) -> str:
    """Return a bar from 0 to 100% with its 95% interval; a second rate gets a bar of the other colour below.

    Args:
        rates: one rate or two.
        label: read out in place of the picture.
    """
    parts = []
    for index, rate in enumerate(rates):
        top = index * (_BAR_HEIGHT + _BAR_GAP)
        middle, low, high = top + _BAR_HEIGHT / 2, *(f"{100 * end:.2f}%" for end in rate.interval)
        colour = _COLOURS[index]
        parts.append(
            f'<rect width="100%" y="{top}" height="{_BAR_HEIGHT}" rx="3" fill="var(--track)"/>'
            f'<rect width="{100 * rate.rate:.2f}%" y="{top}" height="{_BAR_HEIGHT}" rx="3" fill="{colour}" '
            'fill-opacity=".55"/>'
            f'<line x1="{low}" x2="{high}" y1="{middle}" y2="{middle}" stroke="var(--ink)" stroke-width="1.6"/>'
        )
        parts += [
            f'<line x1="{end}" x2="{end}" y1="{top + 2.5}" y2="{top + _BAR_HEIGHT - 2.5}" stroke="var(--ink)" '
            'stroke-width="1.6"/>'
            for end in (low, high)
        ]
    height = len(rates) * (_BAR_HEIGHT + _BAR_GAP) - _BAR_GAP
    return (
        f'<svg width="100%" height="{height}" role="img" overflow="visible" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def learning_curves(curves: Sequence[Curve], *, percent: bool, steps: str) -> str:
    """Up to two curves over the steps of a run, with a legend.

    Args:
        curves: at least one, each with at least one point.
        percent: whether values are shares, drawn from 0 to 100%; else the axis fits them.
        steps: what the steps are, such as control steps.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_ticks = _ticks(0.0, max(xs) or 1.0)
    y_ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if percent else _ticks(min(0.0, *ys), max(ys))
    right, bottom, top = max(x_ticks[-1], max(xs)), y_ticks[0], max(y_ticks[-1], max(ys))

    def across(x: float) -> float:
        return 100 * x / right

    def down(y: float) -> float:
        return 100 * (top - y) / ((top - bottom) or 1.0)

    grid, lines = [], []
    for tick in y_ticks:
        text = f"{tick:.0%}" if percent else f"{tick:g}"
        grid.append(
            f'<line x1="0" x2="100%" y1="{down(tick):.2f}%" y2="{down(tick):.2f}%" stroke="var(--line)"/>'
            f'<text x="-8" y="{down(tick):.2f}%" dy=".32em" text-anchor="end">{text}</text>'
        )
    for tick in x_ticks:
        grid.append(f'<text x="{across(tick):.2f}%" y="100%" dy="20" text-anchor="middle">{_short(tick)}</text>')
    grid.append(f'<text x="50%" y="100%" dy="38" text-anchor="middle">{escape(steps)}</text>')
    for colour, curve in zip(_COLOURS, curves, strict=False):
        path = " ".join(f"{across(x):.2f},{down(y):.2f}" for x, y in curve.points)
        lines.append(
            '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" overflow="visible">'
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round" '
            'vector-effect="non-scaling-stroke"/></svg>'
        )
        lines += [
            f'<circle cx="{across(x):.2f}%" cy="{down(y):.2f}%" r="3" fill="{colour}"><title>{escape(curve.label)}: '
            f"{f'{y:.1%}' if percent else f'{y:.4g}'} after {x:,.0f} {escape(steps)}</title></circle>"
            for x, y in curve.points
        ]
    legend = "".join(
        f'<li><i style="background:{colour}"></i>{escape(curve.label)}</li>'
        for colour, curve in zip(_COLOURS, curves, strict=False)
    )
    # The inner picture leaves room for the labels; its coordinates are shares of what is left.
    return (
        f'<ul class="legend">{legend}</ul>'
        '<div style="padding:10px 22px 44px 46px"><svg width="100%" height="230" overflow="visible" role="img" '
        f'aria-label="{escape(", ".join(curve.label for curve in curves))} over {escape(steps)}" font-size="12" '
        f'fill="var(--soft)">{"".join(grid)}{"".join(lines)}</svg></div>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, from at most low to at most high."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first = math.floor(low / step)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(steps: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if steps >= size:
            return f"{steps / size:g}{suffix}"
    return f"{steps:g}"
