"""The IR: a model as ONNX with typed facts, its dialect, its rules, and its forms as text and as files."""
