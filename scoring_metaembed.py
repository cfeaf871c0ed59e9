"""MaxSim at any budget, and exact top-k search. Tensors in, tensors out; this file knows no model."""
