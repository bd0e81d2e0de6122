// What the files of the host library share. Each holds the integer work of one subject of the data path on the host:
// plain extern "C" over arrays that the caller owns; megaflow/data/native.py loads them as one library. Every function
// has a Python twin with identical results. Callers check ranges: nothing here can fail on checked input.

#pragma once

#include <cstdint>

using i32 = std::int32_t;
using i64 = std::int64_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i128 = __int128;
