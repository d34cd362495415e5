"""The names of the looks: one colour a meaning, the same on every page.

The hues are Okabe and Ito's, safe for the common colour-vision deficiencies; the two
colour maps grow darker with the value, so they also survive a grey-scale print.
"""

from matplotlib import colormaps, style
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

MASK = "#c3b1e1"  # the face of a masked position, and nothing else
MASK_INK = "#5f4b8b"  # its symbol
MASK_SYMBOL = "░"
END_SYMBOL = "∎"  # an [EOS] filler

DIFFUSION = "#0072b2"
AUTOREGRESSIVE = "#d55e00"
EXACT = "#22252b"  # the truth: entropy, exact posterior, theory; drawn dashed
ERASED = "#b0005a"  # a position taken back by the decoder

INK = "#22252b"
PROMPT = "#80868f"  # what was given
FAINT = "#b6bbc2"
PAPER = "#ffffff"

CONFIDENCE: Colormap = LinearSegmentedColormap.from_list(
    "dlm-confidence", ["#fdf6c3", "#a8dc8f", "#2f9e62", "#00553a"]
)
AMOUNT: Colormap = LinearSegmentedColormap.from_list(
    "dlm-amount", ["#f3f7fb", "#a6cbe6", "#3d8fc4", "#0a4a78"]
)


def use() -> None:
    """Apply the style sheet and register the colour maps; importing `show` does this.

    Both colour maps are then known to matplotlib as "dlm-confidence" and "dlm-amount".
    Introduced in notebook 00.
    """
    style.use("dlmlib.show.style")
    for cmap in (CONFIDENCE, AMOUNT):
        colormaps.register(cmap, force=True)


def ink_on(face: object) -> str:
    """Dark or white text, whichever reads better on `face` (a matplotlib colour)."""
    red, green, blue = (int(to_hex(face)[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else PAPER


def display(picture: object, alt: str | None = None) -> None:
    """Show a figure in the notebook with alternative text, then close it.

    Args:
        picture: a figure, or any axes of it.
        alt: what a reader who cannot see the picture should know; by default the titles
            and axis labels.

    Introduced in notebook 00.
    """
    from IPython.display import display as ipython_display
    from matplotlib import pyplot as plt

    figure: Figure = picture.figure
    alt = alt or describe(figure)
    ipython_display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def describe(figure: Figure) -> str:
    """Titles and axis labels of a figure as one line of text."""
    words = [figure.get_suptitle()]
    for ax in figure.axes:
        words += [ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()]
    return "; ".join(" ".join(word.split()) for word in words if word)
