// Marks a function that is compiled for AVX2 too, and chosen when the library is loaded, where the compiler can: GCC with
// glibc on x86 (Clang takes no templates).

#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define MEGAFLOW_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define MEGAFLOW_CLONES
#endif
