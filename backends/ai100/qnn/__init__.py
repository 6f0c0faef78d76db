"""Compile through Qualcomm's AI Engine Direct (QNN) instead of the AI 100 compiler (contract §4.7)."""
