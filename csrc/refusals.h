// What sizes must hold so that no kernel leaves its arrays: asked before any of them runs.
//
// Whoever fills the structs answers for what lies in constant arrays, such as coordinates and orders, once when it makes
// them; pages are looked up anew in every step, so that they are checked here.
#pragma once

#include "baselines.h"

namespace qjl {

extern const QjlLimits limits;

// 0, or what qjl_refusal puts into words.
int64_t refusal(const QjlEncode& operation);
int64_t refusal(const QjlDecode& operation);
int64_t refusal(const QjlStep& operation);
int64_t refusal(const QjlFlashDecode& operation);
int64_t refusal(const QjlPopcountScan& operation);
int64_t refusal(const QjlRead& operation);

}  // namespace qjl
