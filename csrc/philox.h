// Random bits as a pure function of names: Philox4x32-10 (Salmon et al., SC 2011). Twin of fastdiff/philox.py.
#pragma once

#include <cstdint>
#include <cstring>

// FASTDIFF_GPU is for kernels of a GPU, whether one runs them or the emulator in tests/cuda.
#ifdef __CUDACC__
#define FASTDIFF_GPU
#define FASTDIFF_HD __host__ __device__ __forceinline__
#else
#define FASTDIFF_HD inline __attribute__((always_inline))
#endif

namespace fastdiff {

// What a draw is for. Values start at 0x80: smaller ones could repeat torch's own CUDA stream.
enum Purpose : uint32_t {
  kMask = 0x80,
  kSubset = 0x81,
  kCount = 0x82,
  kReplace = 0x83,
  kRace = 0x85,
  kStep = 0x86,
  kDerive = 0xFF,
};

struct Words {
  uint32_t w[4];
};

#ifdef FASTDIFF_GPU
using Lane = uint32_t;
#else
using Lane = uint64_t;  // of which 32 bits are used: lanes as wide as the products vectorise without shuffles
#endif

FASTDIFF_HD Words philox4x32(uint32_t k0, uint32_t k1, uint32_t c0_, uint32_t c1_, uint32_t c2_, uint32_t c3_) {
  Lane c0 = c0_, c1 = c1_, c2 = c2_, c3 = c3_;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<Lane>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<Lane>(p1 & 0xFFFFFFFF);
    c2 = static_cast<Lane>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<Lane>(p0 & 0xFFFFFFFF);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2), static_cast<uint32_t>(c3)}};
}

// The draws of one (seed, purpose, step, sample, row), by index. Steps from 2^24 and samples from 2^32 on go
// through one more Philox call that derives another key.
struct Stream {
  uint32_t k0, k1, row, sample, purpose_step;

  FASTDIFF_HD Stream(int64_t seed, Purpose purpose, int64_t step, int64_t sample_id, uint32_t row_id)
      : k0(static_cast<uint32_t>(seed)),
        k1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        row(row_id),
        sample(static_cast<uint32_t>(sample_id)),
        purpose_step(static_cast<uint32_t>(purpose) << 24 | (static_cast<uint32_t>(step) & 0xFFFFFF)) {
    const uint32_t high_sample = static_cast<uint32_t>(static_cast<uint64_t>(sample_id) >> 32);
    const uint32_t high_step = static_cast<uint32_t>(static_cast<uint64_t>(step) >> 24);
    if (high_sample | high_step) {
      const Words key = philox4x32(k0, k1, high_sample, high_step, 0, static_cast<uint32_t>(kDerive) << 24);
      k0 = key.w[0];
      k1 = key.w[1];
    }
  }

  // Draws 4 * group .. 4 * group + 3.
  FASTDIFF_HD Words four(uint32_t group) const { return philox4x32(k0, k1, group, row, sample, purpose_step); }

  FASTDIFF_HD uint32_t operator()(uint32_t index) const {
    const Words words = four(index >> 2);  // chosen without an address, which would put them in a GPU's memory
    const uint32_t even = index & 2 ? words.w[2] : words.w[0], odd = index & 2 ? words.w[3] : words.w[1];
    return index & 1 ? odd : even;
  }
};

// round(p 2^32), to the nearest even: a 32-bit draw below it has probability p, and p = 1 is above every draw.
FASTDIFF_HD uint64_t threshold(double p) {
  const double shifted = p * 0x1p32 + 0x1p52;  // its low bits are the integer
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  return bits & 0xFFFFFFFFFFFFF;
}

// floor(draw * size / 2^32), for any size.
FASTDIFF_HD int64_t scaled(uint32_t draw, int64_t size) {
  const auto low = static_cast<uint32_t>(size), high = static_cast<uint32_t>(size >> 32);
  return static_cast<int64_t>(uint64_t{draw} * high + (uint64_t{draw} * low >> 32));
}

}  // namespace fastdiff
