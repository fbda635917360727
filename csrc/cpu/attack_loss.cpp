#include "../core/attack_loss.h"

#include "common.h"

namespace pf::cpu {
namespace {

#define PF_LOOPS(CLONES, T)                                                                                 \
  CLONES void compute(const AttackRows<T>& rows, int64_t begin, int64_t end, wide_t<T>* __restrict__ row) { \
    attack_loss(rows, begin, end, row);                                                                     \
  }
PF_FOR_EACH_DTYPE(PF_LOOPS)

std::tuple<Tensor, Tensor, Tensor> attack_loss(Tensor logits, Tensor labels, int64_t kind, bool toward) {
  const ScalarType dtype = logits.scalar_type();
  logits = dense(logits);
  labels = dense(labels);
  const int64_t batch = logits.size(0), classes = logits.size(1);
  const int64_t* classes_of = data<int64_t>(labels);
  for (int64_t i = 0; i < labels.numel(); ++i) {
    STD_TORCH_CHECK(classes_of[i] >= 0 && classes_of[i] < classes, "a label must be in 0 .. ", classes - 1, " for ",
                    classes, " classes, got ", classes_of[i]);
  }
  Tensor gradient = new_like(logits), loss = new_tensor({batch}, wide_dtype(dtype));
  Tensor wrong = new_tensor({batch}, ScalarType::Float);
  dispatch(dtype, "attack_loss", [&](auto tag) {
    using T = decltype(tag);
    using W = wide_t<T>;
    const AttackRows<T> rows{data<T>(logits),
                             classes_of,
                             labels.dim(),
                             classes,
                             static_cast<AttackLoss>(kind),
                             toward ? W(-1) : W(1),
                             writable<T>(gradient),
                             writable<W>(loss),
                             writable<float>(wrong)};
    // A row needs two exponentials for each class.
    parallel_rows(batch, 8 * classes, [&](int64_t begin, int64_t end) {
      constexpr int64_t few = 64;
      W short_row[few];
      std::vector<W> long_row(classes > few ? padded(classes) : 0);
      compute(rows, begin, end, classes > few ? long_row.data() : short_row);
    });
  });
  return {gradient, loss, wrong};
}

}  // namespace
}  // namespace pf::cpu

STABLE_TORCH_LIBRARY_IMPL(purify_fast, CPU, m) { m.impl("attack_loss", TORCH_BOX(&pf::cpu::attack_loss)); }
