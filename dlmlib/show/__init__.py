"""The course's looks: denoising pictures, learning curves and the step scrubber.

Importing `show` applies its style sheet to matplotlib (`show.use()`).
"""

from dlmlib.show.graph_view import graph, graph_scrubber, layers
from dlmlib.show.html_view import Scrubber, scrubber, strip_html
from dlmlib.show.palette import (
    AMOUNT,
    AUTOREGRESSIVE,
    CONFIDENCE,
    DIFFUSION,
    ERASED,
    EXACT,
    MASK,
    MASK_SYMBOL,
    PROMPT,
    display,
    use,
)
from dlmlib.show.plots import bars, curve, heat, learning_curve, reference
from dlmlib.show.strip_view import strip
from dlmlib.show.trace_view import confidence_strip, order

__all__ = [
    "AMOUNT",
    "AUTOREGRESSIVE",
    "CONFIDENCE",
    "DIFFUSION",
    "ERASED",
    "EXACT",
    "MASK",
    "MASK_SYMBOL",
    "PROMPT",
    "Scrubber",
    "bars",
    "confidence_strip",
    "curve",
    "display",
    "graph",
    "graph_scrubber",
    "heat",
    "layers",
    "learning_curve",
    "order",
    "reference",
    "scrubber",
    "strip",
    "strip_html",
    "use",
]

use()
