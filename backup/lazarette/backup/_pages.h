/* Keyed BLAKE3 (16 bytes) of up to PAGES_AT_ONCE pages of 8 KiB, LANES of their 1 KiB chunks side
 * by side.  Included once for each width: LANES, LANED(name) and EVERY_CPU are set before. */
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
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);
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

/* `cvs` has room for the values of the pages' chunks. */
EVERY_CPU static void LANED(hash_pages)(const uint8_t *data, size_t pages, const uint32_t *key,
                                 uint32_t (*cvs)[8], uint8_t *out)
{
    lanes cv[8], counter;
    uint32_t m[16][LANES] __attribute__((aligned(64)));
    const uint8_t *from[LANES];
    const lanes zero = {0};
    size_t count = pages * PAGE_CHUNKS;
    for (size_t first = 0; first < count; first += LANES) {
        for (int i = 0; i < 8; i++)
            cv[i] = zero + key[i];
        for (int l = 0; l < LANES; l++)
            counter[l] = (uint32_t)l % PAGE_CHUNKS;
        for (int l = 0; l < LANES; l++) /* the last lanes may have no chunk: any bytes do */
            from[l] = data + (first + (size_t)l < count ? first + (size_t)l : first) * 1024;
        for (int block = 0; block < 16; block++) {
            LANED(gather)(m, from);
            for (int l = 0; l < LANES; l++)
                from[l] += 64;
            LANED(compress)(cv, (const lanes *)m, &counter,
                     KEYED | (block == 0 ? CHUNK_START : 0) | (block == 15 ? CHUNK_END : 0));
        }
        for (int l = 0; l < LANES; l++)
            for (int i = 0; i < 8; i++)
                cvs[first + (size_t)l][i] = cv[i][l];
    }
    while (count > pages) {
        count /= 2;
        for (size_t first = 0; first < count; first += LANES) {
            for (int i = 0; i < 8; i++)
                cv[i] = zero + key[i];
            for (int l = 0; l < LANES; l++) /* two values of 32 bytes lie together */
                from[l] = (const uint8_t *)cvs[2 * (first + (size_t)l < count ? first + (size_t)l : first)];
            LANED(gather)(m, from);
            LANED(compress)(cv, (const lanes *)m, &zero, KEYED | PARENT | (count == pages ? ROOT : 0));
            for (int l = 0; l < LANES && first + (size_t)l < count; l++)
                for (int i = 0; i < 8; i++)
                    cvs[first + (size_t)l][i] = cv[i][l];
        }
    }
    for (size_t page = 0; page < pages; page++)
        memcpy(out + 16 * page, cvs[page], 16);
}

#undef lanes
