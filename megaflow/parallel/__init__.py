"""How one model runs on many ranks: the mesh, collectives inside autograd, cut layers, gradient sums."""
