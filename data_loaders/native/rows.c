/* Rows of a batch, from the shard to pixels of the size that the model sees: read, check, decode, resample, place.

   Of a JPEG only what the crop needs is decoded: libjpeg-turbo skips the rows above and the columns beside it, nothing
   below is looked at, and a crop that is shrunk to a quarter or less is decoded at 1/2, 1/4 or 1/8 of its size.
   Resampling is that of Pillow (Image.resize, BILINEAR): a triangle as wide as the crop shrinks, in whole numbers, so
   that the pixels are the same with and without vector instructions. Whatever is not plain has a status that is not 0,
   and the caller then takes the slow path. */

#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "libjpeg-turbo 2 or 3 is needed: it decodes parts of a picture"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "made for little-endian machines only"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORTED __attribute__((visibility("default")))
#define QUOTED(x) #x
#define TEXT(x) QUOTED(x)

/* The caps of formats/header.py and formats/jpeg.py. */
enum {
    PIXEL_CAP = 64000000,
    MEMORY = 8,
    SCAN_CAP = 100,
    SCANS_AT_CAP = 16,
    SEGMENT_CAP = 5000,
    STRAY_CAP = 256,
    TABLE_CAP = 1 << 16,
};

enum {
    SIZE_CAP = 1 << 14, /* side of the output */
    LINES = 4,          /* rows decoded at once: as many as libjpeg has ready */
    BITS = 14,          /* of a weight, so that ONE fits 16 bits */
    ONE = 1 << BITS,
    EDGE = 2,           /* pixels beside a crop that colours are interpolated from */
    SPARE = 2,          /* what is decoded at less than its size is shrunk by so much still: less would be seen */
};

/* One image of a batch; the numpy type ROW is the same. */
struct row {
    int32_t fd, length;
    int64_t offset;
    uint32_t crc32c;
    int32_t width, height, place;
    double box[4]; /* left, top, width, height */
    int32_t shift[2], flip, raw, status;
};
_Static_assert(sizeof(struct row) == 88, "as in numpy");

enum { DONE, NOT_READ, WRONG_CHECKSUM, NOT_PLAIN, WRONG_SIZE, WRONG_BOX, NO_MEMORY };

struct buffer {
    void *bytes;
    size_t room;
};

/* One direction, as the picture is stored: which pixels make each place of the output, and where that is. */
struct axis {
    int count;          /* places that are made; others stay black */
    int first, step;    /* where in the image the first of them comes, and the next */
    int from, to;       /* pixels that are needed */
    int taps, stride;   /* most pixels of a place, rounded up to 4s; weights from one place to the next */
    int copy, mirrored; /* whether places are pixels as they are; whether they come in the other order */
    int32_t *start;     /* [count] first pixel */
    int32_t *used;      /* [count] pixels */
    int16_t *weights;   /* [count, stride], which add up to ONE */
    struct buffer room;
};

struct fault {
    struct jpeg_error_mgr manager;
    jmp_buf back;
};

/* What is used for one row after the other. */
struct work {
    struct jpeg_decompress_struct jpeg;
    struct fault fault;
    struct axis x, y;
    struct buffer file, lines, across, made, rows;
    uint8_t *image;        /* where the row comes, [size, size, 3] */
    size_t step_x, step_y; /* bytes from one place to the next, along the rows as stored, and from row to row */
    int ring;              /* resampled rows that are held, of `wide` bytes */
    size_t wide;
    int next; /* row of the output */
    int fast; /* whether the vector instructions are there */
    uint32_t tables[8][256];
};

static int make_room(struct buffer *buffer, size_t size)
{
    if (buffer->room < size) {
        free(buffer->bytes);
        size += size / 4;
        buffer->bytes = calloc(1, size);
        buffer->room = buffer->bytes ? size : 0;
    }
    return buffer->bytes != NULL;
}

/* ---- Checksums: CRC-32C (Castagnoli) ---- */

#if defined(__x86_64__)
enum { LANE = 1024 };

/* The checksum as it is behind LANE (times 2) zero bytes: times a power of x, by the instruction for polynomials, and
   reduced by the one for checksums (Gopal et al. 2011). */
__attribute__((target("sse4.2,pclmul"))) static uint64_t moved_on(uint64_t crc, uint64_t power)
{
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128((int64_t)crc), _mm_cvtsi64_si128((int64_t)power), 0);
    return _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

/* Three lanes at once, since the instruction takes three times as long as it keeps others waiting. */
__attribute__((target("sse4.2,pclmul"))) static uint32_t checksum_fast(const uint8_t *at, size_t length)
{
    const uint64_t once = 0x170076fa, twice = 0xa51b6135; /* x^(8 LANE - 33), x^(16 LANE - 33), reflected */
    uint64_t a = 0xffffffff, word[3];
    for (; length >= 3 * LANE; at += 3 * LANE, length -= 3 * LANE) {
        uint64_t b = 0, c = 0;
        for (int i = 0; i < LANE; i += 8) {
            memcpy(word, at + i, 8), memcpy(word + 1, at + LANE + i, 8), memcpy(word + 2, at + 2 * LANE + i, 8);
            a = _mm_crc32_u64(a, word[0]), b = _mm_crc32_u64(b, word[1]), c = _mm_crc32_u64(c, word[2]);
        }
        a = moved_on(a, twice) ^ moved_on(b, once) ^ c;
    }
    for (; length >= 8; at += 8, length -= 8)
        memcpy(word, at, 8), a = _mm_crc32_u64(a, word[0]);
    for (; length; at++, length--)
        a = _mm_crc32_u8((uint32_t)a, *at);
    return ~(uint32_t)a;
}
#endif

/* [n][byte]: the checksum of a byte with n zero bytes behind it. */
static void fill_tables(uint32_t (*tables)[256])
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (0x82f63b78 & -(crc & 1));
        tables[0][byte] = crc;
    }
    for (int n = 1; n < 8; n++)
        for (int byte = 0; byte < 256; byte++)
            tables[n][byte] = tables[n - 1][byte] >> 8 ^ tables[0][tables[n - 1][byte] & 0xff];
}

static uint32_t checksum(const struct work *work, const uint8_t *at, size_t length)
{
#if defined(__x86_64__)
    if (work->fast)
        return checksum_fast(at, length);
#endif
    const uint32_t(*tables)[256] = work->tables;
    uint32_t crc = 0xffffffff;
    for (uint64_t word; length >= 8; at += 8, length -= 8) {
        memcpy(&word, at, 8);
        word ^= crc;
        crc = 0;
        for (int n = 0; n < 8; n++)
            crc ^= tables[7 - n][word >> 8 * n & 0xff];
    }
    for (; length; at++, length--)
        crc = crc >> 8 ^ tables[0][(crc ^ *at) & 0xff];
    return ~crc;
}

static int read_file(const struct row *row, uint8_t *bytes)
{
    for (int64_t done = 0; done < row->length;) {
        ssize_t count = pread(row->fd, bytes + done, (size_t)(row->length - done), row->offset + done);
        if (count == 0 || (count < 0 && errno != EINTR))
            return 0;
        done += count > 0 ? count : 0;
    }
    return 1;
}

/* ---- What lies before the first scan of a JPEG, as in formats/jpeg.py and formats/exif.py ---- */

static unsigned big2(const uint8_t *at)
{
    return (unsigned)at[0] << 8 | at[1];
}

static uint32_t number(const uint8_t *at, int bytes, int big)
{
    uint32_t found = 0;
    for (int i = 0; i < bytes; i++)
        found |= (uint32_t)at[i] << 8 * (big ? bytes - 1 - i : i);
    return found;
}

static int orientation_of(const uint8_t *tiff, size_t length)
{
    int big = length >= 4 && !memcmp(tiff, "MM\0*", 4);
    if (length < 10 || (!big && memcmp(tiff, "II*\0", 4)))
        return 1;
    uint64_t start = number(tiff + 4, 4, big);
    if (start + 2 > length)
        return 1;
    uint64_t stop = start + 2 + 12 * (uint64_t)number(tiff + start, 2, big);
    for (uint64_t at = start + 2; at < stop && at + 12 <= length; at += 12) {
        if (number(tiff + at, 2, big) != 0x0112)
            continue;
        uint32_t kind = number(tiff + at + 2, 2, big), value = number(tiff + at + 8, kind == 3 ? 2 : 4, big);
        int means = (kind == 3 || kind == 4) && number(tiff + at + 4, 4, big) == 1 && value >= 1 && value <= 8;
        return means ? (int)value : 1;
    }
    return 1;
}

static int is_kept(int marker)
{
    return !((marker >= 0xe1 && marker <= 0xed) || marker == 0xef || marker == 0xfe);
}

static int stands_alone(int marker)
{
    return marker == 0x01 || (marker >= 0xd0 && marker <= 0xd8);
}

/* Where the data of the first scan begin, and the orientation; 0 where anything is odd. */
static size_t walk_header(const uint8_t *file, size_t length, int *orientation)
{
    size_t at = 2, kept = 0;
    int seen = 0;
    *orientation = 1;
    if (length < 4 || memcmp(file, "\xff\xd8\xff", 3))
        return 0;
    for (int segment = 0; segment < SEGMENT_CAP; segment++) {
        size_t begun = at;
        while (at + 1 < length && file[at] == 0xff && file[at + 1] == 0xff && at - begun < STRAY_CAP)
            at++;
        if (at + 4 > length || file[at] != 0xff)
            return 0;
        int marker = file[at + 1];
        if (stands_alone(marker)) {
            at += 2;
            continue;
        }
        size_t size = big2(file + at + 2), start = at + 4, end = at + 2 + size;
        kept += is_kept(marker) ? 2 + size : 0;
        if (marker == 0xd9 || size < 2 || end > length || kept > TABLE_CAP)
            return 0;
        if (marker == 0xe1 && !seen && size > 8 && !memcmp(file + start, "Exif\0\0", 6)) {
            *orientation = orientation_of(file + start + 6, end - start - 6);
            seen = 1;
        }
        if (marker == 0xda)
            return end;
        at = end;
    }
    return 0;
}

/* How many scans there are; 0 where the file has no end. */
static int count_scans(const uint8_t *file, size_t length, size_t at)
{
    int scans = 1;
    for (int segment = 0; segment < SEGMENT_CAP;) {
        const uint8_t *found = at < length ? memchr(file + at, 0xff, length - at) : NULL;
        if (!found || found + 1 >= file + length)
            return 0;
        int marker = found[1];
        at = (size_t)(found - file) + 1;
        if (marker == 0x00 || marker == 0xff || (marker >= 0xd0 && marker <= 0xd7))
            continue; /* a byte of the data, a filler, or a restart */
        if (marker == 0xd9)
            return scans;
        scans += marker == 0xda;
        segment++;
        at++;
        if (stands_alone(marker))
            continue;
        if (at + 2 > length)
            return 0;
        at += big2(file + at);
    }
    return 0;
}

/* ---- Where pixels come, and from which ---- */

/* The places along one direction of the image, of `size`, in the order in which the picture is stored, which is the
   other way round where it is `turned`; then moved and flipped. Returns the first of them that is made. */
static int set_places(struct axis *axis, int size, int turned, int shift, int flip)
{
    shift = shift < -size ? -size : shift > size ? size : shift;
    int low = shift < 0 ? -shift : 0, high = shift < 0 ? size : size - shift, first = turned ? high - 1 : low;
    axis->count = high - low;
    axis->first = flip ? size - 1 - (first + shift) : first + shift;
    axis->step = turned != flip ? -1 : 1;
    return turned ? size - high : low;
}

static double triangle(double x)
{
    return fmax(0, 1 - fabs(x));
}

/* The weights of one place, of at most `stride` pixels; returns how many there are. They add up to ONE, since it is
   their sum that is rounded. */
static int set_weights_of(int16_t *weights, int stride, double centre, double support, int pixels, int *start)
{
    int first = (int)(centre - support + 0.5), stop = (int)(centre + support + 0.5), done = 0, used = 0;
    double sum = 0, part = 0, narrow = 1 / support;
    first = first < 0 ? 0 : first;
    stop = stop > pixels ? pixels : stop;
    for (int x = first; x < stop; x++)
        sum += triangle((x - centre + 0.5) * narrow);
    for (int x = first; x < stop && used < stride; x++) {
        part += triangle((x - centre + 0.5) * narrow);
        int upto = (int)(part / sum * ONE + 0.5);
        if (upto > done || used)
            weights[used++] = (int16_t)(upto - done);
        else
            first++;
        done = upto;
    }
    while (used && !weights[used - 1])
        used--;
    memset(weights + used, 0, (size_t)(stride - used) * sizeof *weights);
    *start = first;
    return used;
}

/* From the box [low, low + length) of `pixels`, resampled to `size` places, those from `begin` on: as Pillow's
   precompute_coeffs has it. Returns 0 where there is no memory. */
static int set_pixels(struct axis *axis, int pixels, double low, double length, int size, int begin)
{
    double scale = length / size, support = scale < 1 ? 1 : scale;
    axis->copy = length == size && low == floor(low);
    axis->from = axis->copy ? (int)low + begin : pixels;
    axis->to = axis->copy ? (int)low + begin + axis->count : 0;
    axis->taps = 4;
    if (axis->copy)
        return 1;
    size_t count = (size_t)axis->count, stride = ((size_t)ceil(2 * support) + 1 + 3) & ~(size_t)3;
    if (!make_room(&axis->room, count * (2 * sizeof(int32_t) + stride * sizeof(int16_t))))
        return 0;
    axis->stride = (int)stride;
    axis->start = axis->room.bytes;
    axis->used = axis->start + count;
    axis->weights = (int16_t *)(axis->used + count);
    for (int i = 0; i < axis->count; i++) {
        double centre = low + (begin + i + 0.5) * scale;
        int16_t *weights = axis->weights + (size_t)i * stride;
        int used = set_weights_of(weights, axis->stride, centre, support, pixels, axis->start + i);
        axis->used[i] = used;
        axis->taps = used > axis->taps ? (used + 3) & ~3 : axis->taps;
        axis->from = axis->start[i] < axis->from ? axis->start[i] : axis->from;
        axis->to = axis->start[i] + used > axis->to ? axis->start[i] + used : axis->to;
    }
    return 1;
}

/* The last place first, so that places follow one another in the image. */
static void turn_round(struct axis *axis)
{
    axis->first += axis->step * (axis->count - 1);
    axis->step = -axis->step;
    axis->mirrored = 1;
    for (int i = 0, j = axis->count - 1; i < j && !axis->copy; i++, j--) {
        int16_t *a = axis->weights + (size_t)i * (size_t)axis->stride;
        int16_t *b = axis->weights + (size_t)j * (size_t)axis->stride;
        int32_t start = axis->start[i], used = axis->used[i];
        axis->start[i] = axis->start[j], axis->start[j] = start;
        axis->used[i] = axis->used[j], axis->used[j] = used;
        for (int k = 0; k < axis->taps; k++) {
            int16_t weight = a[k];
            a[k] = b[k], b[k] = weight;
        }
    }
}

/* Both directions, for a picture of so many pixels, as stored at 1/`scale` of its size. */
static int set_axes(struct work *work, const struct row *row, int width, int height, int scale, int orientation,
                    int size)
{
    /* The other way round across: 2, 3, 6, 7; down: 3, 4, 7, 8. */
    int turned_x = 0xcc >> orientation & 1, turned_y = 0x198 >> orientation & 1, transposed = orientation >= 5;
    struct axis *across = transposed ? &work->y : &work->x, *down = transposed ? &work->x : &work->y;
    int left = set_places(across, size, turned_x, row->shift[1], row->flip & 1);
    int top = set_places(down, size, turned_y, row->shift[0], row->flip >> 1 & 1);
    double x = turned_x ? row->width - row->box[0] - row->box[2] : row->box[0];
    double y = turned_y ? row->height - row->box[1] - row->box[3] : row->box[1];
    int pixels_x = ((transposed ? height : width) + scale - 1) / scale;
    int pixels_y = ((transposed ? width : height) + scale - 1) / scale;
    work->x.mirrored = work->y.mirrored = 0;
    work->next = 0;
    if (!across->count || !down->count)
        return 1;
    if (!set_pixels(across, pixels_x, x / scale, row->box[2] / scale, size, left) ||
        !set_pixels(down, pixels_y, y / scale, row->box[3] / scale, size, top))
        return 0;
    if (work->x.step < 0)
        turn_round(&work->x);
    work->step_x = transposed ? 3 * (size_t)size : 3;
    work->step_y = transposed ? 3 : 3 * (size_t)size;
    work->ring = work->y.taps + 4;
    work->wide = ((size_t)work->x.count * 4 + 31) & ~(size_t)31;
    return make_room(&work->made, work->wide) && make_room(&work->rows, (size_t)work->y.taps * sizeof(uint8_t *)) &&
           (work->y.copy || make_room(&work->across, work->wide * (size_t)work->ring));
}

/* ---- Resampling, of pixels of 4 bytes ---- */

/* A compiler finds vector instructions of its own for loops of fixed length. */
static void across_plain(const struct axis *axis, const uint8_t *in, uint8_t *out)
{
    for (int i = 0; i < axis->count; i++) {
        const uint8_t *pixel = in + 4 * (axis->start[i] - axis->from);
        const int16_t *weights = axis->weights + (size_t)i * (size_t)axis->stride;
        int32_t sums[4] = {ONE / 2, ONE / 2, ONE / 2, ONE / 2};
        for (int tap = 0; tap < axis->used[i]; tap++)
            for (int c = 0; c < 4; c++)
                sums[c] += weights[tap] * pixel[4 * tap + c];
        for (int c = 0; c < 4; c++)
            out[4 * i + c] = (uint8_t)(sums[c] >> BITS);
    }
}

static void down_plain(uint8_t *const *rows, const int16_t *weights, int used, size_t bytes, uint8_t *out)
{
    enum { BLOCK = 32 };
    for (size_t x = 0; x < bytes; x += BLOCK) {
        int32_t sums[BLOCK];
        for (int k = 0; k < BLOCK; k++)
            sums[k] = ONE / 2;
        for (int tap = 0; tap < used; tap++)
            for (int k = 0; k < BLOCK; k++)
                sums[k] += weights[tap] * rows[tap][x + (size_t)k];
        for (int k = 0; k < BLOCK; k++)
            out[x + (size_t)k] = (uint8_t)(sums[k] >> BITS);
    }
}

#if defined(__x86_64__)
/* Two places at once, one in each half, from four pixels of each: those of a colour stand side by side in twos. */
__attribute__((target("avx2"))) static void across_fast(const struct axis *axis, const uint8_t *in, uint8_t *out)
{
    const __m256i one_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i three_four = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    int taps = axis->taps;
    size_t stride = (size_t)axis->stride;
    for (int i = 0; i < axis->count; i += 2) {
        int j = i + 1 < axis->count ? i + 1 : i;
        const uint8_t *a = in + 4 * (axis->start[i] - axis->from), *b = in + 4 * (axis->start[j] - axis->from);
        const int16_t *by_a = axis->weights + (size_t)i * stride, *by_b = axis->weights + (size_t)j * stride;
        __m256i sums = _mm256_set1_epi32(ONE / 2);
        for (int tap = 0; tap < taps; tap += 4) {
            __m256i pixels = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(a + 4 * tap))),
                _mm_loadu_si128((const __m128i *)(b + 4 * tap)), 1);
            __m256i by = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(by_a + tap))),
                _mm_loadl_epi64((const __m128i *)(by_b + tap)), 1);
            __m256i first = _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, one_two), _mm256_shuffle_epi32(by, 0x00));
            __m256i second = _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, three_four), _mm256_shuffle_epi32(by, 0x55));
            sums = _mm256_add_epi32(sums, _mm256_add_epi32(first, second));
        }
        sums = _mm256_srai_epi32(sums, BITS);
        sums = _mm256_packus_epi16(_mm256_packs_epi32(sums, sums), sums);
        int32_t made_a = _mm256_extract_epi32(sums, 0), made_b = _mm256_extract_epi32(sums, 4);
        memcpy(out + 4 * i, &made_a, 4);
        memcpy(out + 4 * j, &made_b, 4);
    }
}

/* 16 bytes at once, of two rows side by side. */
__attribute__((target("avx2"))) static void down_fast(
    uint8_t *const *rows, const int16_t *weights, int used, size_t bytes, uint8_t *out)
{
    for (size_t x = 0; x < bytes; x += 16) {
        __m256i low = _mm256_set1_epi32(ONE / 2), high = low;
        for (int tap = 0; tap < used; tap += 2) {
            int other = tap + 1 < used ? tap + 1 : tap; /* behind the last weight stands a 0 */
            __m128i a = _mm_loadu_si128((const __m128i *)(rows[tap] + x));
            __m128i b = _mm_loadu_si128((const __m128i *)(rows[other] + x));
            int32_t two;
            memcpy(&two, weights + tap, 4);
            __m256i by = _mm256_set1_epi32(two);
            low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), by));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b)), by));
        }
        __m256i both = _mm256_packs_epi32(_mm256_srai_epi32(low, BITS), _mm256_srai_epi32(high, BITS));
        both = _mm256_permute4x64_epi64(_mm256_packus_epi16(both, both), 0x08);
        __m128i found = _mm256_castsi256_si128(both);
        /* halves hold bytes 0-3 and 8-11, then 4-7 and 12-15 */
        found = _mm_shuffle_epi32(found, _MM_SHUFFLE(3, 1, 2, 0));
        _mm_storeu_si128((__m128i *)(out + x), found);
    }
}

/* Without every fourth byte, as far as whole stores reach; returns how many pixels that are. */
__attribute__((target("ssse3"))) static int pack_fast(const uint8_t *in, uint8_t *out, int count)
{
    const __m128i three = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    int i = 0;
    for (; i + 6 <= count; i += 4) { /* a store of 16 bytes is 5 pixels and a third */
        __m128i pixels = _mm_loadu_si128((const __m128i *)(in + 4 * i));
        _mm_storeu_si128((__m128i *)(out + 3 * i), _mm_shuffle_epi8(pixels, three));
    }
    return i;
}
#endif

static void mirror(const uint8_t *in, uint8_t *out, int count)
{
    for (int i = 0; i < count; i++)
        memcpy(out + 4 * i, in + 4 * (count - 1 - i), 4);
}

static void across(const struct work *work, const uint8_t *in, uint8_t *out)
{
    if (work->x.copy && work->x.mirrored)
        mirror(in, out, work->x.count);
    else if (work->x.copy)
        memcpy(out, in, 4 * (size_t)work->x.count);
#if defined(__x86_64__)
    else if (work->fast)
        across_fast(&work->x, in, out);
#endif
    else
        across_plain(&work->x, in, out);
}

static uint8_t *ring_row(const struct work *work, int y)
{
    return (uint8_t *)work->across.bytes + (size_t)(y % work->ring) * work->wide;
}

static void down(const struct work *work, int row, uint8_t *out)
{
    const int16_t *weights = work->y.weights + (size_t)row * (size_t)work->y.stride;
    uint8_t **rows = work->rows.bytes;
    int used = work->y.used[row];
    for (int tap = 0; tap < used; tap++)
        rows[tap] = ring_row(work, work->y.start[row] + tap);
#if defined(__x86_64__)
    if (work->fast) {
        down_fast(rows, weights, used, 4 * (size_t)work->x.count, out);
        return;
    }
#endif
    down_plain(rows, weights, used, 4 * (size_t)work->x.count, out);
}

/* A row of the output into the image. */
static void write_row(const struct work *work, int row, const uint8_t *pixels)
{
    size_t line = (size_t)(work->y.first + row * work->y.step);
    uint8_t *out = work->image + line * work->step_y + (size_t)work->x.first * work->step_x;
    int i = 0;
#if defined(__x86_64__)
    if (work->fast && work->step_x == 3)
        i = pack_fast(pixels, out, work->x.count);
#endif
    for (; i < work->x.count; i++)
        memcpy(out + (size_t)i * work->step_x, pixels + 4 * i, 3);
}

/* Takes the row y of the picture, from the pixel x.from on, and writes what rows of the output can be made of it. */
static void take_line(struct work *work, int y, const uint8_t *pixels)
{
    if (y < work->y.from || y >= work->y.to)
        return;
    if (work->y.copy) {
        int as_is = work->x.copy && !work->x.mirrored;
        if (!as_is)
            across(work, pixels, work->made.bytes);
        write_row(work, y - work->y.from, as_is ? pixels : work->made.bytes);
        return;
    }
    across(work, pixels, ring_row(work, y));
    for (; work->next < work->y.count && work->y.start[work->next] + work->y.used[work->next] <= y + 1; work->next++) {
        down(work, work->next, work->made.bytes);
        write_row(work, work->next, work->made.bytes);
    }
}

/* ---- Decoding ---- */

static void give_up(j_common_ptr jpeg)
{
    longjmp(((struct fault *)jpeg->err)->back, 1);
}

/* A warning is of damage too: what libjpeg makes up then is not the picture. */
static void hear(j_common_ptr jpeg, int level)
{
    if (level < 0)
        give_up(jpeg);
}

static void say_nothing(j_common_ptr jpeg)
{
    (void)jpeg;
}

static int is_bounded(struct jpeg_decompress_struct *jpeg, const uint8_t *file, size_t length, size_t at)
{
    double pixels = (double)jpeg->image_width * jpeg->image_height, share = 0;
    int many = jpeg->progressive_mode || jpeg->comps_in_scan < jpeg->num_components;
    if (!many && file[length - 2] == 0xff && file[length - 1] == 0xd9)
        return 1;
    for (int c = 0; c < jpeg->num_components; c++)
        share += jpeg->comp_info[c].h_samp_factor * jpeg->comp_info[c].v_samp_factor;
    share /= jpeg->max_h_samp_factor * jpeg->max_v_samp_factor;
    int scans = count_scans(file, length, at);
    return scans && (!many || (pixels * (4 + 2 * share) <= (double)MEMORY * PIXEL_CAP && scans <= SCAN_CAP &&
                               scans <= floor((double)SCANS_AT_CAP * PIXEL_CAP / pixels)));
}

static int is_plain(const struct jpeg_decompress_struct *jpeg)
{
    J_COLOR_SPACE colours = jpeg->jpeg_color_space;
    int known = jpeg->num_components == 1 ? colours == JCS_GRAYSCALE
                                          : jpeg->num_components == 3 && (colours == JCS_YCbCr || colours == JCS_RGB);
    return known && jpeg->data_precision == 8 && !jpeg->arith_code &&
           (double)jpeg->image_width * jpeg->image_height <= PIXEL_CAP;
}

/* Whether the scans hold every coefficient to its last bit: libjpeg would smooth what is not. */
static int is_complete(const struct jpeg_decompress_struct *jpeg)
{
    for (int c = 0; jpeg->progressive_mode && c < jpeg->num_components; c++)
        for (int i = 0; i < DCTSIZE2; i++)
            if (jpeg->coef_bits[c][i])
                return 0;
    return 1;
}

static int scale_of(double width, double height, int size)
{
    int scale = 1;
    while (scale < 8 && fmin(width, height) >= 2.0 * SPARE * scale * size)
        scale *= 2;
    return scale;
}

static int fits(const struct row *row, int width, int height)
{
    const double *box = row->box;
    int across = box[0] >= 0 && box[2] > 0 && box[0] + box[2] <= width;
    return across && box[1] >= 0 && box[3] > 0 && box[1] + box[3] <= height;
}

static int read_lines(struct work *work)
{
    struct jpeg_decompress_struct *jpeg = &work->jpeg;
    JDIMENSION left = 0, width = jpeg->output_width;
    int from = work->x.from - EDGE, to = work->x.to + EDGE;
    if (from > 0 || to < (int)width) {
        left = (JDIMENSION)(from > 0 ? from : 0);
        width = (to < (int)width ? (JDIMENSION)to : width) - left;
        jpeg_crop_scanline(jpeg, &left, &width);
    }
    /* Rows begin beside multiples of 32: to those libjpeg-turbo writes past the caches, and they are read at once. */
    size_t line = (4 * ((size_t)width + (size_t)work->x.taps) + 31) & ~(size_t)31;
    if (!make_room(&work->lines, LINES * line + 36))
        return NO_MEMORY;
    JSAMPROW lines[LINES];
    for (int i = 0; i < LINES; i++)
        lines[i] = (uint8_t *)work->lines.bytes + (36 - (uintptr_t)work->lines.bytes % 32) + (size_t)i * line;
    if (work->y.from > 0)
        jpeg_skip_scanlines(jpeg, (JDIMENSION)work->y.from);
    while ((int)jpeg->output_scanline < work->y.to) {
        int y = (int)jpeg->output_scanline, count = (int)jpeg_read_scanlines(jpeg, lines, LINES);
        if (!count)
            return NOT_PLAIN;
        for (int i = 0; i < count; i++)
            take_line(work, y + i, lines[i] + 4 * (work->x.from - (int)left));
    }
    return DONE;
}

/* Of a JPEG whose first scan begins at `data`. */
static int decode(struct work *work, const struct row *row, int size, size_t data, int orientation)
{
    struct jpeg_decompress_struct *jpeg = &work->jpeg;
    const uint8_t *file = work->file.bytes;
    jpeg_create_decompress(jpeg);
    jpeg_mem_src(jpeg, file, (size_t)row->length);
    jpeg_read_header(jpeg, TRUE);
    int width = (int)jpeg->image_width, height = (int)jpeg->image_height, upright = orientation < 5;
    int scale = scale_of(row->box[upright ? 2 : 3], row->box[upright ? 3 : 2], size);
    if (!is_plain(jpeg) || !is_bounded(jpeg, file, (size_t)row->length, data))
        return NOT_PLAIN;
    if (row->width != (upright ? width : height) || row->height != (upright ? height : width))
        return WRONG_SIZE;
    if (!fits(row, row->width, row->height))
        return WRONG_BOX;
    if (!set_axes(work, row, width, height, scale, orientation, size))
        return NO_MEMORY;
    if (!work->x.count || !work->y.count)
        return DONE;
    jpeg->scale_num = 1;
    jpeg->scale_denom = (unsigned)scale;
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg->dct_method = JDCT_ISLOW; /* JDCT_IFAST is no faster where there are vector instructions */
    jpeg->do_block_smoothing = FALSE;
    jpeg_start_decompress(jpeg);
    return is_complete(jpeg) ? read_lines(work) : NOT_PLAIN;
}

/* The same, but for errors, from which libjpeg does not return. Not inlined: what registers hold is lost then. */
__attribute__((noinline)) static int try_decode(struct work *work, const struct row *row, int size, size_t data,
                                                int orientation)
{
    if (setjmp(work->fault.back))
        return NOT_PLAIN;
    return decode(work, row, size, data, orientation);
}

static int take_jpeg(struct work *work, const struct row *row, int size)
{
    int orientation;
    size_t data = walk_header(work->file.bytes, (size_t)row->length, &orientation);
    if (!data)
        return NOT_PLAIN;
    work->jpeg.err = jpeg_std_error(&work->fault.manager);
    work->jpeg.err->error_exit = give_up;
    work->jpeg.err->emit_message = hear;
    work->jpeg.err->output_message = say_nothing;
    /* Each file has a decoder of its own: tables of one would serve the next that lacks them. */
    int status = try_decode(work, row, size, data, orientation);
    jpeg_destroy_decompress(&work->jpeg);
    return status;
}

/* Pixels of 3 bytes, which are brought to 4 where they are resampled. */
static int take_raw(struct work *work, const struct row *row, int size)
{
    int side = row->raw;
    if (side > PIXEL_CAP / side || (int64_t)side * side * 3 != row->length)
        return WRONG_SIZE;
    struct row square = *row;
    square.width = square.height = side;
    if (!fits(row, side, side))
        return WRONG_BOX;
    if (!set_axes(work, &square, side, side, 1, 1, size))
        return NO_MEMORY;
    if (!work->x.count || !work->y.count)
        return DONE;
    int from = work->x.from, count = work->x.to - from;
    if (!make_room(&work->lines, 4 * ((size_t)count + (size_t)work->x.taps)))
        return NO_MEMORY;
    int as_is = work->x.copy && work->y.copy && !work->x.mirrored;
    for (int y = work->y.from; y < work->y.to; y++) {
        const uint8_t *in = (const uint8_t *)work->file.bytes + 3 * ((size_t)y * (size_t)side + (size_t)from);
        uint8_t *line = work->lines.bytes;
        if (as_is) {
            size_t place = (size_t)(work->y.first + (y - work->y.from) * work->y.step);
            memcpy(work->image + place * work->step_y + 3 * (size_t)work->x.first, in, 3 * (size_t)count);
            continue;
        }
        for (int x = 0; x < count; x++)
            memcpy(line + 4 * x, in + 3 * x, 3);
        take_line(work, y, line);
    }
    return DONE;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int fetch(struct work *work, const struct row *row)
{
    if (row->length < 1 || row->length > (row->raw ? 3 : 1) * PIXEL_CAP)
        return NOT_PLAIN;
    if (!make_room(&work->file, (size_t)row->length))
        return NO_MEMORY;
    if (!read_file(row, work->file.bytes))
        return NOT_READ;
    return checksum(work, work->file.bytes, (size_t)row->length) == row->crc32c ? DONE : WRONG_CHECKSUM;
}

static int place(struct work *work, const struct row *row, int size)
{
    if (row->shift[0] || row->shift[1])
        memset(work->image, 0, (size_t)size * (size_t)size * 3);
    return row->raw ? take_raw(work, row, size) : take_jpeg(work, row, size);
}

static void free_all(struct work *work)
{
    struct buffer *all[] = {&work->x.room, &work->y.room, &work->file, &work->lines,
                            &work->across, &work->made,   &work->rows};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]->bytes);
    free(work);
}

/* Fills `images` [count, size, size, 3] for all rows, and adds nanoseconds to `spent`: reading, decoding. Without
   `fast`, no vector instructions of ours are used. */
EXPORTED void evenkeel_load(struct row *rows, int64_t number, uint8_t *images, int64_t count, int64_t size, int fast,
                            int64_t *spent)
{
    struct work *work = calloc(1, sizeof *work);
    for (int64_t i = 0; i < number; i++)
        rows[i].status = NO_MEMORY;
    if (!work || size < 1 || size > SIZE_CAP) {
        free(work);
        return;
    }
#if defined(__x86_64__)
    work->fast = fast && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("sse4.2") &&
                 __builtin_cpu_supports("pclmul");
#endif
    if (!work->fast)
        fill_tables(work->tables);
    for (int64_t i = 0; i < number; i++) {
        struct row *row = rows + i;
        int64_t began = now();
        int inside = row->place >= 0 && row->place < count && row->raw >= 0;
        row->status = inside ? fetch(work, row) : WRONG_BOX;
        int64_t read = now();
        spent[0] += read - began;
        if (row->status)
            continue;
        work->image = images + (size_t)row->place * (size_t)size * (size_t)size * 3;
        row->status = place(work, row, (int)size);
        spent[1] += now() - read;
    }
    free_all(work);
}

static uint64_t scramble(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* `permute` of stream.py, word for word: a keyed bijection of range(size) for each place. */
EXPORTED void evenkeel_permute(const uint64_t *places, const uint64_t *sizes, const uint64_t *keys, int64_t count,
                               uint64_t rounds, int least_half_bits, uint64_t *out)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t size = sizes[i], x = places[i];
        int half = (65 - __builtin_clzll(size > 2 ? size - 1 : 1)) / 2;
        half = half > least_half_bits ? half : least_half_bits;
        uint64_t mask = ((uint64_t)1 << half) - 1;
        do {
            uint64_t left = x >> half, right = x & mask;
            for (uint64_t turn = 0; turn < rounds; turn++) {
                uint64_t next = left ^ (scramble(right + scramble(keys[i] + turn)) & mask);
                left = right;
                right = next;
            }
            x = (left << half) | right;
        } while (x >= size);
        out[i] = x;
    }
}

/* What it was made from: the loader does not call one that was made from something else. */
EXPORTED uint32_t evenkeel_source(void)
{
    return SOURCE;
}

EXPORTED const char *evenkeel_name(void)
{
    return "libjpeg-turbo " TEXT(LIBJPEG_TURBO_VERSION) " (native)";
}
