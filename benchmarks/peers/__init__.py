"""Whoever runs beside qeff-ir in a race, a file each."""
