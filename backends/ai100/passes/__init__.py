"""Passes that only this target needs: the range of halves, and operators that the compiler takes."""
