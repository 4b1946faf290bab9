"""Models of sparse data that are no click-through models: embeddings, factors, clusters, trees.

Each file is one algorithm, says whose paper it follows, and has its options as a value.
"""
