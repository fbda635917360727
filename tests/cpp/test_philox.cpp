#include <initializer_list>

#include "check.h"
#include "core/philox.h"

namespace {

using pf::Distribution;
using pf::Stream;

void check_words(const uint32_t* words, std::initializer_list<uint32_t> wanted) {
  for (uint32_t word : wanted) CHECK(*words++ == word);
}

// The known answers that were published with Philox4x32-10.
void published_vectors() {
  uint32_t w[4] = {0, 0, 0, 0};
  pf::philox({0, 0}, w[0], w[1], w[2], w[3]);
  check_words(w, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
  for (uint32_t& word : w) word = 0xffffffffu;
  pf::philox({0xffffffffu, 0xffffffffu}, w[0], w[1], w[2], w[3]);
  check_words(w, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
  uint32_t pi[4] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u};
  pf::philox({0xa4093822u, 0x299f31d0u}, pi[0], pi[1], pi[2], pi[3]);
  check_words(pi, {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

// One vector per stream, for seed 0x0123456789abcdef, sample 5, draw 2, elements 0 to 3. They must never change.
void streams() {
  const pf::Key key = pf::key_of(0x0123456789abcdef);
  CHECK(key.low == 0x89abcdefu && key.high == 0x01234567u);
  CHECK(pf::key_of(-1).low == 0xffffffffu && pf::key_of(-1).high == 0xffffffffu);
  const auto check_stream = [&](Stream stream, std::initializer_list<uint32_t> wanted) {
    uint32_t out[4];
    pf::draw_group(Distribution::bits, key, 0, 2, 5, static_cast<uint32_t>(stream), out);
    check_words(out, wanted);
  };
  check_stream(Stream::latent, {0xaf90d69bu, 0x58f6c18eu, 0x73a76f0du, 0xa02c1d04u});
  check_stream(Stream::transform_noise, {0xceaa37c5u, 0xd4c350a6u, 0x27cecc30u, 0xb5d09bb9u});
  check_stream(Stream::mask, {0x67ae2cc1u, 0x93f84b58u, 0x76418fd6u, 0x92205d10u});
  check_stream(Stream::attack_start, {0xe77dde3eu, 0xadccb51bu, 0xcf86d0cbu, 0x962c96b5u});
  check_stream(Stream::replay_noise, {0xd1dd806cu, 0xd3c93e03u, 0x96030ebbu, 0xbef17232u});
  check_stream(Stream::augmentation, {0xbee54480u, 0x2b643a41u, 0x63e77931u, 0x6e14b11eu});

  const double normals[] = {-0.49947136640548706, 0.7105319499969482, -0.8876107931137085, -0.895150899887085,
                            -0.09911739081144333, 0.8154287934303284, 0.8258047699928284,  3.0224974155426025};
  for (uint32_t group = 0; group < 2; ++group) {
    uint32_t out[4];
    pf::draw_group(Distribution::normal, key, group, 2, 5, static_cast<uint32_t>(Stream::latent), out);
    for (int i = 0; i < 4; ++i) {
      const float z = pf::bit_cast<float>(out[i]);
      CHECK_NEAR(z, normals[4 * group + i], 4e-7 * (1 + std::abs(z)));
    }
  }
}

void ranges() {
  CHECK(pf::uniform(0) == 0 && pf::uniform(0xffffffffu) < 1 && pf::uniform(0x100u) == 0x1p-24f);
  float a, b;
  // The largest possible radius is sqrt(-2 ln 2^-24) = 5.77.
  pf::normal_pair(0, 0, a, b);
  CHECK_NEAR(a, std::sqrt(48 * std::log(2.0)), 1e-6);
  CHECK(b == 0);
  // Here u = 1.
  pf::normal_pair(0xffffffffu, 0, a, b);
  CHECK(a == 0 && b == 0);
}

void moments() {
  double sum = 0, square = 0, fourth = 0;
  const int groups = 1 << 18;
  for (uint32_t group = 0; group < groups; ++group) {
    uint32_t out[4];
    pf::draw_group(Distribution::normal, pf::key_of(1), group, 0, 0, 1, out);
    for (uint32_t bits : out) {
      const double z = pf::bit_cast<float>(bits);
      sum += z;
      square += z * z;
      fourth += z * z * z * z;
    }
  }
  // The standard errors of the three means are 0.001, 0.0014 and 0.01.
  const double n = 4.0 * groups;
  CHECK_NEAR(sum / n, 0, 0.005);
  CHECK_NEAR(square / n, 1, 0.007);
  CHECK_NEAR(fourth / n, 3, 0.05);
}

}  // namespace

int main() {
  published_vectors();
  streams();
  ranges();
  moments();
  return failures > 0;
}
