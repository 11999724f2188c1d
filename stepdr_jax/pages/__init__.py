"""HTML pages that open offline: one renderer, their templates, styles, plots, and the words that all of them use."""
