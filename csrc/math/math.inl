// All of the mathematics, for inclusion inside a namespace that already has the vocabulary of scalar.inl.
#include "grid.inl"
#include "constraint.inl"
#include "update.inl"
#include "sam.inl"
#include "random.inl"
#include "scales.inl"
