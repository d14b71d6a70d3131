"""Shared drawing helpers: figures outside pyplot, and lines, axes and legends in one style."""

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Event = dict[str, Any]
Shown = TypeVar("Shown")

MOST_NAMED = 30
"""Most clients that the picture of holdings numbers individually, and most rounds with large markers on curves."""


def new_figure(width: float, height: float) -> "Figure":
    """Returns a figure outside pyplot, which changes no global state and needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def as_png(draw: "Callable[[Shown], Figure]", shown: Shown) -> bytes:
    """Returns the figure that `draw` makes of `shown` as a PNG file."""
    from matplotlib import rc_context

    content = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # a task may be named $5
        draw(shown).savefig(content, format="png")
    return content.getvalue()


def colors(names: Sequence[str]) -> list[Any]:
    """Returns a colour for each name."""
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(len(names))]


WITHHELD = "withheld: private clients do not report it"
"""In place of a training loss that no client reports."""


def say(axes: "Axes", text: str) -> None:
    """Writes into an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, transform=axes.transAxes)


def draw_line(axes: "Axes", rounds: Sequence[float], values: list[float], linewidth: float = 1.5, **style: Any) -> None:
    """Draws values by round as a line with markers."""
    marker_size = linewidth + (2.5 if len(rounds) <= MOST_NAMED else 0.5)
    own: dict[str, Any] = {"marker": "o", "markersize": marker_size, "linewidth": linewidth, "clip_on": False}
    if rounds:  # an unclipped line without points has no bounds, and the layout fails
        axes.plot(rounds, values, **own | style)


def style_round_axes(axes: "Axes", title: str, last_round: float) -> None:
    """Sets the title of axes over rounds, and starts both axes at zero."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10)
    axes.set_xlabel("round", fontsize=9)
    axes.set_xlim(0, max(1, last_round) if last_round != 1 else 1.5)  # keeps a single round off the edge
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    plain(axes)
    highest = axes.dataLim.ymax  # -inf without data
    axes.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else 1.0)


def plain(axes: "Axes") -> None:
    """Removes visual clutter: small ticks, a faint grid, no top or right spine."""
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend_outside(axes: "Axes", columns: int = 1) -> None:
    """Puts the legend to the right of the axes, so that it never covers data."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8, ncols=columns)


def or_nan(value: float | None) -> float:
    """Returns the number, or nan for None."""
    return float("nan") if value is None else value
