// Philox4x32-10 (Salmon et al., SC 2011) and stochastic rounding.
// Element i of a tensor takes word i % 4 of the block with counter i / 4, key = seed: the numbers depend on
// the seed and the position alone, never on threads, vectors or launch shape.

struct Philox4 {
  uint32_t word[4];
};

ASKEW_FN Philox4 philox(uint64_t seed, uint64_t counter) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in [0, 1), 24 bits.
ASKEW_FN float uniform01(uint32_t bits) { return (float)(bits >> 8) * 5.9604644775390625e-8f; }

// The bracket's far end with probability u, else the nearest level: E[level] = x inside the hull. Clamped once more in
// grid units: 7 s / s may round to just above 7, and the far end of that bracket, 8, is no level.
template <class F, class Grid>
ASKEW_FN F stochastic_level(F w, F uniform, const Row<F, Grid>& row) {
  F x = clamp_between(in_hull(w, row), F{} + row.grid.low(), F{} + row.grid.high());
  Offset<F> o = lower_at_ties(row.grid.offset(x), row.grid);
  return select(both(uniform < o.u, o.u > 0.f), o.far, o.near);
}
