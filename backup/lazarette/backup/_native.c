/* The loops of backup and restore that cost too much in Python: listing a directory with
 * its inodes, reading and writing many small files, cutting content into chunks, hashing
 * the pages of databases.
 *
 * Each function lets go of the interpreter's lock while it works.  The pure Python versions
 * in native.py define what they do; the same tests run on both.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Inode as a tuple: mode uid gid size mtime_ns ctime_ns inode links device rdev blocks.
 * Times are seconds * 10^9 + nanoseconds, which may not fit 64 bits: two numbers. */
static PyObject *inode_tuple(PyObject *name, const struct stat *s)
{
    return Py_BuildValue("(OIIILLLLLKKKKL)", name, (unsigned)s->st_mode, (unsigned)s->st_uid,
                         (unsigned)s->st_gid, (long long)s->st_size,
                         (long long)s->st_mtim.tv_sec, (long long)s->st_mtim.tv_nsec,
                         (long long)s->st_ctim.tv_sec, (long long)s->st_ctim.tv_nsec,
                         (unsigned long long)s->st_ino, (unsigned long long)s->st_nlink,
                         (unsigned long long)s->st_dev, (unsigned long long)s->st_rdev,
                         (long long)s->st_blocks);
}

struct listed {
    struct stat status;
    size_t name;
    size_t length;
};

static PyObject *scan(PyObject *self, PyObject *args)
{
    int directory, error = 0;
    if (!PyArg_ParseTuple(args, "i", &directory))
        return NULL;
    struct listed *rows = NULL;
    char *names = NULL;
    size_t count = 0, room = 0, used = 0, space = 0;
    Py_BEGIN_ALLOW_THREADS
    int again = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *stream = again < 0 ? NULL : fdopendir(again);
    if (stream == NULL) {
        error = errno;
        if (again >= 0)
            close(again);
    }
    while (stream != NULL && error == 0) {
        errno = 0;
        struct dirent *entry = readdir(stream);
        if (entry == NULL) {
            error = errno;
            break;
        }
        const char *name = entry->d_name;
        if (name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0)))
            continue;
        size_t length = strlen(name);
        if (count == room) {
            room = room ? room * 2 : 64;
            void *grown = realloc(rows, room * sizeof *rows);
            if (grown == NULL) { error = ENOMEM; break; }
            rows = grown;
        }
        if (used + length > space) {
            space = (space + length) * 2 + 1024;
            void *grown = realloc(names, space);
            if (grown == NULL) { error = ENOMEM; break; }
            names = grown;
        }
        if (fstatat(directory, name, &rows[count].status, AT_SYMLINK_NOFOLLOW) != 0) {
            if (errno == ENOENT)
                continue;
            error = errno;
            break;
        }
        memcpy(names + used, name, length);
        rows[count].name = used;
        rows[count].length = length;
        used += length;
        count++;
    }
    if (stream != NULL)
        closedir(stream);
    Py_END_ALLOW_THREADS
    PyObject *list = NULL;
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
    } else if ((list = PyList_New((Py_ssize_t)count)) != NULL) {
        for (size_t i = 0; i < count; i++) {
            PyObject *name = PyBytes_FromStringAndSize(names + rows[i].name,
                                                       (Py_ssize_t)rows[i].length);
            PyObject *row = name == NULL ? NULL : inode_tuple(name, &rows[i].status);
            Py_XDECREF(name);
            if (row == NULL) {
                Py_CLEAR(list);
                break;
            }
            PyList_SET_ITEM(list, (Py_ssize_t)i, row);
        }
    }
    free(rows);
    free(names);
    if (list != NULL && PyList_Sort(list) != 0)
        Py_CLEAR(list);
    return list;
}

struct small {
    int directory;
    const char *name;
    Py_ssize_t size;
    /* results */
    int error;
    int changed;
    unsigned long flags;
    ssize_t attributes;
    size_t at;
    ssize_t got;
    struct stat status;
};

static int same_state(const struct stat *a, const struct stat *b)
{
    return a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec &&
           a->st_ctim.tv_sec == b->st_ctim.tv_sec && a->st_ctim.tv_nsec == b->st_ctim.tv_nsec &&
           a->st_size == b->st_size;
}

static void read_one(struct small *file, char *buffer)
{
    int how = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
    struct stat before;
    int fd = openat(file->directory, file->name, how | O_NOATIME);
    if (fd < 0 && errno == EPERM)
        fd = openat(file->directory, file->name, how);
    if (fd < 0) {
        file->error = errno;
        return;
    }
    if (fstat(fd, &before) != 0) {
        file->error = errno;
    } else {
        ssize_t got = 0;
        do {
            ssize_t step = read(fd, buffer + got, (size_t)(file->size + 1 - got));
            if (step < 0) {
                if (errno == EINTR)
                    continue;
                file->error = errno;
                break;
            }
            if (step == 0)
                break;
            got += step;
        } while (got <= file->size);
        file->got = got;
        if (ioctl(fd, FS_IOC_GETFLAGS, &file->flags) != 0)
            file->flags = 0;
        file->attributes = flistxattr(fd, NULL, 0);
        if (file->error == 0 && fstat(fd, &file->status) != 0)
            file->error = errno;
        file->changed = !S_ISREG(before.st_mode) || !same_state(&before, &file->status) ||
                        got != file->status.st_size;
    }
    close(fd);
}

static PyObject *read_files(PyObject *self, PyObject *args)
{
    PyObject *list;
    if (!PyArg_ParseTuple(args, "O!", &PyList_Type, &list))
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(list);
    struct small *files = calloc((size_t)count + 1, sizeof *files);
    if (files == NULL)
        return PyErr_NoMemory();
    size_t total = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "iyn", &files[i].directory,
                              &files[i].name, &files[i].size)) {
            free(files);
            return NULL;
        }
        files[i].at = total;
        total += (size_t)files[i].size + 1;
    }
    char *arena = malloc(total + 1);
    if (arena == NULL) {
        free(files);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++)
        read_one(&files[i], arena + files[i].at);
    Py_END_ALLOW_THREADS
    PyObject *out = PyList_New(count);
    for (Py_ssize_t i = 0; out != NULL && i < count; i++) {
        struct small *f = &files[i];
        PyObject *row;
        if (f->error != 0 || f->changed) {
            row = Py_BuildValue("(iOOkn)", f->error, Py_None, Py_None, 0UL, (Py_ssize_t)0);
        } else {
            PyObject *inode = inode_tuple(Py_None, &f->status);
            row = inode == NULL ? NULL
                                : Py_BuildValue("(iNy#kn)", 0, inode, arena + f->at,
                                                (Py_ssize_t)f->got, f->flags,
                                                (Py_ssize_t)f->attributes);
        }
        if (row == NULL) {
            Py_CLEAR(out);
            break;
        }
        PyList_SET_ITEM(out, i, row);
    }
    free(arena);
    free(files);
    return out;
}

struct made {
    int directory;
    const char *name;
    Py_buffer data;
    unsigned mode;
    long long uid, gid, seconds, nanoseconds;
    int error, stage;
};

static void write_one(struct made *file)
{
    int fd = openat(file->directory, file->name,
                    O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) {
        file->error = errno;
        file->stage = 1;
        return;
    }
    Py_ssize_t done = 0;
    while (done < file->data.len) {
        ssize_t step = write(fd, (char *)file->data.buf + done, (size_t)(file->data.len - done));
        if (step < 0 && errno == EINTR)
            continue;
        if (step < 0) {
            file->error = errno;
            file->stage = 2;
            close(fd);
            return;
        }
        done += step;
    }
    struct timespec times[2] = {{file->seconds, file->nanoseconds},
                                {file->seconds, file->nanoseconds}};
    if ((file->uid >= 0 && fchown(fd, (uid_t)file->uid, (gid_t)file->gid) != 0) ||
        fchmod(fd, (mode_t)file->mode) != 0 || futimens(fd, times) != 0) {
        file->error = errno;
        file->stage = 3;
    }
    close(fd);
}

static PyObject *write_files(PyObject *self, PyObject *args)
{
    PyObject *list, *out = NULL;
    if (!PyArg_ParseTuple(args, "O!", &PyList_Type, &list))
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(list), parsed = 0;
    struct made *files = calloc((size_t)count + 1, sizeof *files);
    if (files == NULL)
        return PyErr_NoMemory();
    for (; parsed < count; parsed++) {
        struct made *f = &files[parsed];
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, parsed), "iyy*ILLLL", &f->directory, &f->name,
                              &f->data, &f->mode, &f->uid, &f->gid, &f->seconds,
                              &f->nanoseconds))
            goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++)
        write_one(&files[i]);
    Py_END_ALLOW_THREADS
    out = PyList_New(count);
    for (Py_ssize_t i = 0; out != NULL && i < count; i++) {
        PyObject *row = Py_BuildValue("(ii)", files[i].stage, files[i].error);
        if (row == NULL)
            Py_CLEAR(out);
        else
            PyList_SET_ITEM(out, i, row);
    }
done:
    for (Py_ssize_t i = 0; i < parsed; i++)
        PyBuffer_Release(&files[i].data);
    free(files);
    return out;
}

/* Lengths of chunks; see chunker.py for the rule. */
static PyObject *cuts(PyObject *self, PyObject *args)
{
    Py_buffer data, table;
    Py_ssize_t least, average, most;
    unsigned strict, loose;
    int final;
    if (!PyArg_ParseTuple(args, "y*y*nnnIIp", &data, &table, &least, &average, &most, &strict,
                          &loose, &final))
        return NULL;
    const uint8_t *bytes = data.buf;
    const uint32_t *gear = table.buf;
    Py_ssize_t start = 0, count = 0, room = data.len / (least ? least : 1) + 2;
    Py_ssize_t *lengths = malloc((size_t)room * sizeof *lengths);
    if (lengths != NULL && table.len == 1024) {
        Py_BEGIN_ALLOW_THREADS
        while (data.len - start > (final ? 0 : most)) {
            Py_ssize_t left = data.len - start, at = least - 32;
            Py_ssize_t end = left < most ? left : most, cut = end;
            Py_ssize_t turn = average < end ? average : end;
            const uint8_t *chunk = bytes + start;
            uint32_t hash = 0;
            if (left > least) {
                for (; at < least - 1; at++)
                    hash = (hash << 1) + gear[chunk[at]];
                /* A cut after byte `at` makes a chunk of at + 1 bytes. */
                for (; at < turn - 1; at++) {
                    hash = (hash << 1) + gear[chunk[at]];
                    if ((hash & strict) == 0) { cut = at + 1; goto found; }
                }
                for (; at < end; at++) {
                    hash = (hash << 1) + gear[chunk[at]];
                    if ((hash & loose) == 0) { cut = at + 1; goto found; }
                }
            }
        found:
            lengths[count++] = cut;
            start += cut;
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&table);
    if (lengths == NULL)
        return PyErr_NoMemory();
    PyObject *out = PyList_New(count);
    for (Py_ssize_t i = 0; out != NULL && i < count; i++) {
        PyObject *number = PyLong_FromSsize_t(lengths[i]);
        if (number == NULL)
            Py_CLEAR(out);
        else
            PyList_SET_ITEM(out, i, number);
    }
    free(lengths);
    return out;
}

/* Keyed BLAKE3 of many pages: BLAKE3's own function (github.com/BLAKE3-team/BLAKE3-specs); the
 * wheel that serves elsewhere takes one input a call, which at this size costs as much as the
 * hashing.  Sixteen chunks side by side fill the registers of AVX-512; with AVX2, half as wide and
 * half as many, they would spend their time in the cache: eight there. */
#define HASHED_PAGE 8192
#define PAGE_CHUNKS (HASHED_PAGE / 1024)
#define PAGES_AT_ONCE 16
#define MOST_LANES 16
enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8, KEYED = 16 };
typedef uint32_t quad __attribute__((vector_size(16)));

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __builtin_cpu_supports("avx512f")
#define CLONED __attribute__((target_clones("default", "avx2")))
#else
#define CLONED
#endif
#define ROTATE(x, n) (((x) >> (n)) | ((x) << (32 - (n))))
#define MIX(a, b, c, d, x, y)                                                             \
    do {                                                                                  \
        a += b + (x); d = ROTATE(d ^ a, 16); c += d; b = ROTATE(b ^ c, 12);               \
        a += b + (y); d = ROTATE(d ^ a, 8); c += d; b = ROTATE(b ^ c, 7);                 \
    } while (0)
#define ROUND(m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, ma, mb, mc, md, me, mf)             \
    do {                                                                                  \
        MIX(s0, s4, s8, sc, m[m0], m[m1]); MIX(s1, s5, s9, sd, m[m2], m[m3]);             \
        MIX(s2, s6, sa, se, m[m4], m[m5]); MIX(s3, s7, sb, sf, m[m6], m[m7]);             \
        MIX(s0, s5, sa, sf, m[m8], m[m9]); MIX(s1, s6, sb, sc, m[ma], m[mb]);             \
        MIX(s2, s7, s8, sd, m[mc], m[md]); MIX(s3, s4, s9, se, m[me], m[mf]);             \
    } while (0)

#define ROUNDS                                                                            \
    do {                                                                                  \
        ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);                      \
        ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);                      \
        ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);                      \
        ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);                      \
        ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);                      \
        ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);                      \
        ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);                      \
    } while (0)

/* A whole chunk of something longer: where it is, its number there, and where its value goes. */
struct chunk {
    const uint8_t *data;
    uint32_t number;
    uint32_t (*value)[8];
};

#define LANES 8
#define LANED(name) name##_8
#define EVERY_CPU CLONED
#include "_pages.h"
#undef LANES
#undef LANED
#undef EVERY_CPU

#ifdef WIDE
#define LANES 16
#define LANED(name) name##_16
#define EVERY_CPU __attribute__((target("avx512f")))
#include "_pages.h"
#endif

/* One block of 64 bytes by itself. */
static void compress_one(uint32_t *cv, const uint8_t *block, uint32_t length, uint32_t counter,
                         uint32_t flags)
{
    uint32_t m[16];
    memcpy(m, block, sizeof m);
    uint32_t s0 = cv[0], s1 = cv[1], s2 = cv[2], s3 = cv[3], s4 = cv[4], s5 = cv[5], s6 = cv[6],
             s7 = cv[7], s8 = 0x6A09E667u, s9 = 0xBB67AE85u, sa = 0x3C6EF372u, sb = 0xA54FF53Au,
             sc = counter, sd = 0, se = length, sf = flags;
    ROUNDS;
    cv[0] = s0 ^ s8; cv[1] = s1 ^ s9; cv[2] = s2 ^ sa; cv[3] = s3 ^ sb;
    cv[4] = s4 ^ sc; cv[5] = s5 ^ sd; cv[6] = s6 ^ se; cv[7] = s7 ^ sf;
}

/* The value of a last or only chunk, of up to 1024 bytes. */
static void last_chunk(const uint8_t *data, size_t length, uint32_t number, uint32_t root,
                       const uint32_t *key, uint32_t *cv)
{
    uint32_t flags = KEYED | CHUNK_START;
    memcpy(cv, key, 32);
    for (; length > 64; data += 64, length -= 64, flags = KEYED)
        compress_one(cv, data, 64, number, flags);
    uint8_t block[64] = {0};
    if (length > 0)
        memcpy(block, data, length);
    compress_one(cv, block, (uint32_t)length, number, flags | CHUNK_END | root);
}

/* Hashes, 16 bytes each, of data of any length; `chunks` and `cvs` have room for all of it. */
static void hash_each(const Py_buffer *data, Py_ssize_t count, const uint8_t *key,
                      struct chunk *chunks, uint32_t (*cvs)[8], uint8_t *to)
{
    uint32_t words[8], (*value)[8] = cvs;
    size_t whole = 0;
    memcpy(words, key, 32);
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint8_t *at = data[i].buf;
        size_t left = (size_t)data[i].len;
        uint32_t number = 0;
        for (; left > 1024; at += 1024, left -= 1024)
            chunks[whole++] = (struct chunk){at, number++, value++};
        last_chunk(at, left, number, number == 0 ? ROOT : 0, words, *value++);
    }
    void (*hash_chunks)(const struct chunk *, size_t, const uint32_t *) = hash_chunks_8;
    void (*hash_parents)(uint32_t (*)[8], size_t, const uint32_t *) = hash_parents_8;
#ifdef WIDE
    if (WIDE) {
        hash_chunks = hash_chunks_16;
        hash_parents = hash_parents_16;
    }
#endif
    hash_chunks(chunks, whole, words);
    value = cvs;
    for (Py_ssize_t i = 0; i < count; i++) {
        size_t had = data[i].len > 0 ? ((size_t)data[i].len + 1023) / 1024 : 1, left = had;
        for (; left > 2; left = (left + 1) / 2) {
            hash_parents(value, left / 2, words);
            if (left % 2 == 1)
                memcpy(value[left / 2], value[left - 1], 32);
        }
        uint32_t root[8];
        memcpy(root, left == 2 ? words : value[0], 32);
        if (left == 2)
            compress_one(root, (const uint8_t *)value, 64, 0, KEYED | PARENT | ROOT);
        memcpy(to + 16 * i, root, 16);
        value += had;
    }
}

static PyObject *hashes(PyObject *self, PyObject *args)
{
    PyObject *list, *out = NULL;
    Py_buffer key;
    if (!PyArg_ParseTuple(args, "O!y*", &PyList_Type, &list, &key))
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(list), parsed = 0;
    Py_buffer *data = calloc((size_t)count + 1, sizeof *data);
    struct chunk *chunks = NULL;
    uint32_t (*cvs)[8] = NULL;
    size_t pieces = 0;
    for (; data != NULL && parsed < count; parsed++) {
        if (PyObject_GetBuffer(PyList_GET_ITEM(list, parsed), &data[parsed], PyBUF_SIMPLE) < 0)
            goto done;
        pieces += (size_t)data[parsed].len / 1024 + 1;
    }
    chunks = malloc((pieces + 1) * sizeof *chunks);
    cvs = malloc((pieces + 1) * sizeof *cvs);
    if (data == NULL || chunks == NULL || cvs == NULL)
        PyErr_NoMemory();
    else if (key.len != 32)
        PyErr_SetString(PyExc_ValueError, "a key of 32 bytes is needed");
    else
        out = PyBytes_FromStringAndSize(NULL, count * 16);
    if (out != NULL) {
        uint8_t *to = (uint8_t *)PyBytes_AS_STRING(out);
        Py_BEGIN_ALLOW_THREADS
        hash_each(data, count, key.buf, chunks, cvs, to);
        Py_END_ALLOW_THREADS
    }
done:
    while (parsed > 0)
        PyBuffer_Release(&data[--parsed]);
    free(data);
    free(chunks);
    free(cvs);
    PyBuffer_Release(&key);
    return out;
}

/* Hashes of `pages` pages, 16 bytes each. */
static void hash_all(const uint8_t *data, size_t pages, const uint8_t *key, uint8_t *to)
{
    uint32_t words[8], cvs[PAGES_AT_ONCE * PAGE_CHUNKS + MOST_LANES][8];
    memcpy(words, key, 32);
    void (*hash_pages)(const uint8_t *, size_t, const uint32_t *, uint32_t (*)[8],
                       uint8_t *) = hash_pages_8;
#ifdef WIDE
    if (WIDE)
        hash_pages = hash_pages_16;
#endif
    for (size_t at = 0; at < pages; at += PAGES_AT_ONCE) {
        size_t some = pages - at < PAGES_AT_ONCE ? pages - at : PAGES_AT_ONCE;
        hash_pages(data + at * HASHED_PAGE, some, words, cvs, to + at * 16);
    }
}

static PyObject *page_hashes(PyObject *self, PyObject *args)
{
    Py_buffer data, key;
    if (!PyArg_ParseTuple(args, "y*y*", &data, &key))
        return NULL;
    PyObject *out = NULL;
    size_t pages = (size_t)data.len / HASHED_PAGE;
    if (key.len != 32 || data.len % HASHED_PAGE != 0)
        PyErr_SetString(PyExc_ValueError, "whole pages and a key of 32 bytes are needed");
    else
        out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)pages * 16);
    if (out != NULL) {
        uint8_t *to = (uint8_t *)PyBytes_AS_STRING(out);
        Py_BEGIN_ALLOW_THREADS
        hash_all(data.buf, pages, key.buf, to);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&key);
    return out;
}

struct range {
    long long offset;
    Py_ssize_t length;
};

/* Bytes read, fewer at the end of the file; -1 on an error. */
static ssize_t read_ranges(int file, const struct range *ranges, Py_ssize_t count, char *to)
{
    char *at = to;
    for (Py_ssize_t i = 0; i < count; i++) {
        for (Py_ssize_t got = 0; got < ranges[i].length;) {
            ssize_t step = pread(file, at, (size_t)(ranges[i].length - got),
                                 (off_t)(ranges[i].offset + got));
            if (step < 0 && errno == EINTR)
                continue;
            if (step < 0)
                return -1;
            if (step == 0)
                return at - to;
            got += step;
            at += step;
        }
    }
    return at - to;
}

/* read_pages(file, ranges, into, key): hashes of the pages of all ranges, which lie one after
 * another in `into`; None when the file ends before.  One call for many blocks: taking the
 * interpreter's lock again after each would cost more than reading them. */
static PyObject *read_pages(PyObject *self, PyObject *args)
{
    int file;
    PyObject *list, *out = NULL;
    Py_buffer into, key;
    if (!PyArg_ParseTuple(args, "iO!w*y*", &file, &PyList_Type, &list, &into, &key))
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(list), total = 0, done = 0;
    struct range *ranges = calloc((size_t)count + 1, sizeof *ranges);
    if (ranges == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "Ln", &ranges[i].offset,
                              &ranges[i].length))
            goto done;
        if (ranges[i].length < 0 || ranges[i].length > into.len - total)
            total = -1;
        if (total < 0)
            break;
        total += ranges[i].length;
    }
    if (total < 0 || total % HASHED_PAGE != 0 || key.len != 32) {
        PyErr_SetString(PyExc_ValueError, "whole pages, room for them and a key of 32 bytes");
        goto done;
    }
    out = PyBytes_FromStringAndSize(NULL, total / HASHED_PAGE * 16);
    if (out == NULL)
        goto done;
    uint8_t *to = (uint8_t *)PyBytes_AS_STRING(out);
    Py_BEGIN_ALLOW_THREADS
    done = read_ranges(file, ranges, count, into.buf);
    if (done == total)
        hash_all(into.buf, (size_t)(total / HASHED_PAGE), key.buf, to);
    Py_END_ALLOW_THREADS
    if (done < 0) {
        Py_CLEAR(out);
        PyErr_SetFromErrno(PyExc_OSError);
    } else if (done < total) {
        Py_SETREF(out, Py_NewRef(Py_None));
    }
done:
    free(ranges);
    PyBuffer_Release(&into);
    PyBuffer_Release(&key);
    return out;
}

/* A block is a mebibyte, comes and goes thousands of times, and by default its memory is given
 * back each time and faulted in anew, which costs as much as hashing it. */
static PyObject *keep_memory(PyObject *self, PyObject *args)
{
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"scan", scan, METH_VARARGS, "Entries of a directory with their inodes, sorted."},
    {"read_files", read_files, METH_VARARGS, "Read small files whole."},
    {"write_files", write_files, METH_VARARGS, "Make, fill and dress small files."},
    {"keep_memory", keep_memory, METH_NOARGS, "Let free memory stay with the process."},
    {"cuts", cuts, METH_VARARGS, "Lengths of content-defined chunks."},
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    {"hashes", hashes, METH_VARARGS, "Keyed BLAKE3 of several pieces of data."},
    {"page_hashes", page_hashes, METH_VARARGS, "Keyed BLAKE3 of pages of 8 KiB."},
    {"read_pages", read_pages, METH_VARARGS, "Read pages of a file and hash them."},
#endif
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
