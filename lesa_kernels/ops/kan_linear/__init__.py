"""The KAN layer: B-spline bases and the matrix product with them."""
