"""From a model source to a Program: the one home of torch, transformers and the importers built on them."""
