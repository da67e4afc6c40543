/* SplitMix64 (Steele et al. 2014): the same numbers on every machine. */
#include <stdint.h>

static uint64_t state; /* the seed */

static uint64_t random_number(uint64_t below) {
    state += 0x9E3779B97F4A7C15u;
    uint64_t word = state;
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return (word ^ (word >> 31)) % below;
}
