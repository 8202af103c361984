/* Keyed BLAKE3, LANES of the 1 KiB chunks side by side.  Included once for each width: LANES,
 * LANED(name) and EVERY_CPU are set before. */
typedef uint32_t LANED(lanes) __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef uint8_t LANED(bytes) __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
#define lanes LANED(lanes)

static inline __attribute__((always_inline)) void LANED(compress)(lanes *cv, const lanes *m,
                                                           const lanes *counter, uint32_t flags)
{
    const lanes zero = {0};
    lanes s0 = cv[0], s1 = cv[1], s2 = cv[2], s3 = cv[3], s4 = cv[4], s5 = cv[5], s6 = cv[6],
          s7 = cv[7], s8 = zero + 0x6A09E667u, s9 = zero + 0xBB67AE85u, sa = zero + 0x3C6EF372u,
          sb = zero + 0xA54FF53Au, sc = *counter, sd = zero, se = zero + 64u, sf = zero + flags;
    ROUNDS;
    cv[0] = s0 ^ s8; cv[1] = s1 ^ s9; cv[2] = s2 ^ sa; cv[3] = s3 ^ sb;
    cv[4] = s4 ^ sc; cv[5] = s5 ^ sd; cv[6] = s6 ^ se; cv[7] = s7 ^ sf;
}

/* Word w of the 64 bytes at from[l] into m[w], lane l: 4 by 4 words at a time. */
static inline __attribute__((always_inline)) void LANED(gather)(uint32_t (*m)[LANES],
                                                         const uint8_t *const *from)
{
    for (int l = 0; l < LANES; l += 4) {
        for (int w = 0; w < 16; w += 4) {
            quad a, b, c, d;
            memcpy(&a, from[l] + 4 * w, 16);
            memcpy(&b, from[l + 1] + 4 * w, 16);
            memcpy(&c, from[l + 2] + 4 * w, 16);
            memcpy(&d, from[l + 3] + 4 * w, 16);
            quad ab0 = __builtin_shuffle(a, b, (quad){0, 4, 1, 5});
            quad ab1 = __builtin_shuffle(a, b, (quad){2, 6, 3, 7});
            quad cd0 = __builtin_shuffle(c, d, (quad){0, 4, 1, 5});
            quad cd1 = __builtin_shuffle(c, d, (quad){2, 6, 3, 7});
            quad rows[4] = {__builtin_shuffle(ab0, cd0, (quad){0, 1, 4, 5}),
                            __builtin_shuffle(ab0, cd0, (quad){2, 3, 6, 7}),
                            __builtin_shuffle(ab1, cd1, (quad){0, 1, 4, 5}),
                            __builtin_shuffle(ab1, cd1, (quad){2, 3, 6, 7})};
            for (int i = 0; i < 4; i++)
                memcpy(&m[w + i][l], &rows[i], 16);
        }
    }
}

/* Values of up to LANES whole chunks; `from` is moved to their ends. */
static inline __attribute__((always_inline)) void LANED(chunk_values)(
    const uint8_t **from, const lanes *counter, const uint32_t *key, size_t count,
    uint32_t (*const *cvs)[8])
{
    lanes cv[8];
    uint32_t m[16][LANES] __attribute__((aligned(64)));
    const lanes zero = {0};
    for (int i = 0; i < 8; i++)
        cv[i] = zero + key[i];
    for (int block = 0; block < 16; block++) {
        LANED(gather)(m, from);
        for (int l = 0; l < LANES; l++)
            from[l] += 64;
        LANED(compress)(cv, (const lanes *)m, counter,
                 KEYED | (block == 0 ? CHUNK_START : 0) | (block == 15 ? CHUNK_END : 0));
    }
    for (size_t l = 0; l < LANES && l < count; l++)
        for (int i = 0; i < 8; i++)
            (*cvs[l])[i] = cv[i][l];
}

/* One level of a tree: `count` pairs of values become as many, in their place. */
static inline __attribute__((always_inline)) void LANED(parents)(
    uint32_t (*cvs)[8], size_t count, const uint32_t *key, uint32_t flags)
{
    lanes cv[8];
    uint32_t m[16][LANES] __attribute__((aligned(64)));
    const uint8_t *from[LANES];
    const lanes zero = {0};
    for (size_t first = 0; first < count; first += LANES) {
        for (int i = 0; i < 8; i++)
            cv[i] = zero + key[i];
        for (int l = 0; l < LANES; l++) /* two values of 32 bytes lie together */
            from[l] = (const uint8_t *)cvs[2 * (first + (size_t)l < count ? first + (size_t)l : first)];
        LANED(gather)(m, from);
        LANED(compress)(cv, (const lanes *)m, &zero, KEYED | PARENT | flags);
        for (size_t l = 0; l < LANES && first + l < count; l++)
            for (int i = 0; i < 8; i++)
                cvs[first + l][i] = cv[i][l];
    }
}

/* Hashes of up to PAGES_AT_ONCE pages; `cvs` has room for the values of their chunks. */
EVERY_CPU static void LANED(hash_pages)(const uint8_t *data, size_t pages, const uint32_t *key,
                                 uint32_t (*cvs)[8], uint8_t *out)
{
    lanes counter = {0};
    const uint8_t *from[LANES];
    uint32_t (*to[LANES])[8];
    size_t count = pages * PAGE_CHUNKS;
    for (int l = 0; l < LANES; l++)
        counter[l] = (uint32_t)l % PAGE_CHUNKS;
    for (size_t first = 0; first < count; first += LANES) {
        for (size_t l = 0; l < LANES; l++) { /* the last lanes may have no chunk: any bytes do */
            from[l] = data + (first + l < count ? first + l : first) * 1024;
            to[l] = &cvs[first + l];
        }
        LANED(chunk_values)(from, &counter, key, LANES, to);
    }
    while (count > pages) {
        count /= 2;
        LANED(parents)(cvs, count, key, count == pages ? ROOT : 0);
    }
    for (size_t page = 0; page < pages; page++)
        memcpy(out + 16 * page, cvs[page], 16);
}

/* Values of whole chunks that lie anywhere. */
EVERY_CPU static void LANED(hash_chunks)(const struct chunk *chunks, size_t count,
                                         const uint32_t *key)
{
    lanes counter = {0};
    const uint8_t *from[LANES];
    uint32_t (*to[LANES])[8];
    for (size_t first = 0; first < count; first += LANES) {
        for (size_t l = 0; l < LANES; l++) {
            const struct chunk *one = &chunks[first + l < count ? first + l : first];
            from[l] = one->data;
            counter[l] = one->number;
            to[l] = one->value;
        }
        LANED(chunk_values)(from, &counter, key, count - first, to);
    }
}

EVERY_CPU static void LANED(hash_parents)(uint32_t (*cvs)[8], size_t count, const uint32_t *key)
{
    LANED(parents)(cvs, count, key, 0);
}

#undef lanes
