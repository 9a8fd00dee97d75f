"""Commands around a run, one a file; training imports none of them."""
