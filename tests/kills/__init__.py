"""Builds that are killed, or meet a failing disk, at a drawn event of the file system: nothing is lost or wrong.

python -m tests.kills --runs 1000 --seed 1
"""
