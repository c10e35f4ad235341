"""The cost of rounded weights to a model whose own lie on no grid."""
