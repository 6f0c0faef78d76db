"""The tests of qeff-ir."""
