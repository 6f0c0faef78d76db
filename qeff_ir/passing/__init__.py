"""The pass infrastructure: what a pass is, pipelines as text and values, and the manager that runs them."""
