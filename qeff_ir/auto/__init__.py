"""The Auto classes: models that are opened, compiled and run in three calls, as transformers' users write them."""
