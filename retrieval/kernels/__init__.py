"""Compiled MaxSim: one kernel for the CPU, one for CUDA."""
