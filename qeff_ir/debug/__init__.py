"""Seeing what passes do, and what to do when one breaks: diffs, reports, numeric checks, bundles, bisection."""
