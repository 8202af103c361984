/* What a folder with many files costs most in Python: a few system calls an entry, and the objects
 * made around each of them.
 *
 * Each function does one folder, or a batch of its files, without the interpreter's lock.  The
 * pure Python versions in native.py define what they do; the same tests run on both.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define BUFFER (1 << 16)
#define SMALL (1 << 20)
#define DEEPEST 500

/* -- listings ---------------------------------------------------------------------------- */

typedef struct __attribute__((packed)) {
    uint64_t device;
    uint64_t inode;
    int64_t changed;
    uint32_t changed_ns;
    uint32_t mode;
    uint32_t links;
    uint16_t name;
} Record;

typedef struct {
    char *bytes;
    size_t length, room;
} Growing;

static int append(Growing *all, const void *bytes, size_t length)
{
    if (all->length + length > all->room) {
        size_t room = 2 * (all->room + length);
        char *larger = realloc(all->bytes, room);
        if (larger == NULL)
            return -1;
        all->bytes = larger;
        all->room = room;
    }
    memcpy(all->bytes + all->length, bytes, length);
    all->length += length;
    return 0;
}

static int append_entry(Growing *all, int folder, const char *name)
{
    struct stat s;
    if (fstatat(folder, name, &s, AT_SYMLINK_NOFOLLOW) != 0)
        return errno == ENOENT ? 0 : -1;
    Record record = {
        .device = s.st_dev,
        .inode = s.st_ino,
        .changed = s.st_ctim.tv_sec,
        .changed_ns = (uint32_t)s.st_ctim.tv_nsec,
        .mode = s.st_mode,
        .links = (uint32_t)s.st_nlink,
        .name = (uint16_t)strlen(name),
    };
    return append(all, &record, sizeof record) || append(all, name, record.name) ? -1 : 0;
}

static int list_folder(int folder, Growing *all)
{
    char *buffer = malloc(BUFFER);
    long got = -1;
    if (buffer == NULL || lseek(folder, 0, SEEK_SET) < 0)
        goto done;
    while ((got = syscall(SYS_getdents64, folder, buffer, BUFFER)) > 0) {
        for (long at = 0; at < got;) {
            struct dirent64 *entry = (struct dirent64 *)(buffer + at);
            const char *name = entry->d_name;
            at += entry->d_reclen;
            if (name[0] == '.' && (name[1] == 0 || (name[1] == '.' && name[2] == 0)))
                continue;
            if (append_entry(all, folder, name) < 0) {
                got = -1;
                goto done;
            }
        }
    }
done:
    free(buffer);
    return got < 0 ? -1 : 0;
}

/* scan(folder): its entries, each a record and its name. */
static PyObject *scan(PyObject *self, PyObject *argument)
{
    Growing all = {NULL, 0, 0};
    int failed, folder = (int)PyLong_AsLong(argument);
    if (folder == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = list_folder(folder, &all);
    Py_END_ALLOW_THREADS
    PyObject *result = failed ? PyErr_SetFromErrno(PyExc_OSError)
                              : PyBytes_FromStringAndSize(all.bytes, (Py_ssize_t)all.length);
    free(all.bytes);
    return result;
}

/* -- trees ------------------------------------------------------------------------------- */

typedef struct {
    char *path;
    size_t length;
    Growing listing;
} Folder;

typedef struct {
    Folder *folders;
    size_t count, room;
} Tree;

static int open_folder(int parent, const char *name)
{
    struct open_how how = {
        .flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC,
        .resolve = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS,
    };
    long opened;
    do
        opened = syscall(SYS_openat2, parent, name, &how, sizeof how);
    while (opened < 0 && errno == EAGAIN);
    return (int)opened;
}

static Folder *add_folder(Tree *tree, const char *above, size_t length, const char *name)
{
    if (tree->count == tree->room) {
        size_t room = 2 * tree->room + 64;
        Folder *larger = realloc(tree->folders, room * sizeof *larger);
        if (larger == NULL)
            return NULL;
        tree->folders = larger;
        tree->room = room;
    }
    Folder *added = &tree->folders[tree->count];
    memset(added, 0, sizeof *added);
    added->path = malloc(length + strlen(name) + 2);
    if (added->path == NULL)
        return NULL;
    memcpy(added->path, above, length);
    if (length > 0)
        added->path[length++] = '/';
    strcpy(added->path + length, name);
    added->length = length + strlen(name);
    tree->count++;
    return added;
}

/* List a folder that was added last, and those below it that can be opened. */
static int list_tree(int folder, Tree *tree, int depth)
{
    size_t own = tree->count - 1;
    Growing listing = {NULL, 0, 0};
    int failed = list_folder(folder, &listing);
    tree->folders[own].listing = listing;
    if (failed)
        return -1;
    const char *at = listing.bytes, *end = at + listing.length;
    while (at < end) {
        Record record;
        char name[256];
        memcpy(&record, at, sizeof record);
        at += sizeof record + record.name;
        if (!S_ISDIR(record.mode) || depth == DEEPEST || record.name >= sizeof name)
            continue;
        memcpy(name, at - record.name, record.name);
        name[record.name] = 0;
        int inner = open_folder(folder, name);
        if (inner < 0) {
            if (errno == ENOENT || errno == ENOTDIR || errno == ELOOP || errno == EXDEV)
                continue;
            return -1;
        }
        const Folder *above = &tree->folders[own];
        failed = add_folder(tree, above->path, above->length, name) == NULL ||
                 list_tree(inner, tree, depth + 1);
        close(inner);
        if (failed)
            return -1;
    }
    return 0;
}

/* scan_tree(folder): the listings of a folder and of those below it, by path. */
static PyObject *scan_tree(PyObject *self, PyObject *argument)
{
    Tree tree = {NULL, 0, 0};
    int failed, folder = (int)PyLong_AsLong(argument);
    if (folder == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = add_folder(&tree, "", 0, "") == NULL || list_tree(folder, &tree, 0);
    Py_END_ALLOW_THREADS
    PyObject *found = failed ? PyErr_SetFromErrno(PyExc_OSError) : PyDict_New();
    for (size_t index = 0; index < tree.count; index++) {
        Folder *one = &tree.folders[index];
        if (found != NULL) {
            PyObject *path = PyBytes_FromStringAndSize(one->path, (Py_ssize_t)one->length);
            PyObject *listing = PyBytes_FromStringAndSize(one->listing.bytes,
                                                          (Py_ssize_t)one->listing.length);
            if (path == NULL || listing == NULL || PyDict_SetItem(found, path, listing) < 0)
                Py_CLEAR(found);
            Py_XDECREF(path);
            Py_XDECREF(listing);
        }
        free(one->path);
        free(one->listing.bytes);
    }
    free(tree.folders);
    return found;
}

/* split(listing): records by name. */
static PyObject *split(PyObject *self, PyObject *listing)
{
    if (!PyBytes_Check(listing)) {
        PyErr_SetString(PyExc_TypeError, "split(listing)");
        return NULL;
    }
    const char *at = PyBytes_AS_STRING(listing), *end = at + PyBytes_GET_SIZE(listing);
    PyObject *found = PyDict_New();
    while (found != NULL && at < end) {
        Record record;
        if (end - at < (Py_ssize_t)sizeof record)
            goto damaged;
        memcpy(&record, at, sizeof record);
        if (end - at < (Py_ssize_t)(sizeof record + record.name))
            goto damaged;
        PyObject *value = PyBytes_FromStringAndSize(at, sizeof record);
        PyObject *name = PyBytes_FromStringAndSize(at + sizeof record, record.name);
        if (value == NULL || name == NULL || PyDict_SetItem(found, name, value) < 0)
            Py_CLEAR(found);
        Py_XDECREF(value);
        Py_XDECREF(name);
        at += sizeof record + record.name;
    }
    return found;
damaged:
    Py_DECREF(found);
    PyErr_SetString(PyExc_ValueError, "a listing ends in the middle of an entry");
    return NULL;
}

/* -- copies ------------------------------------------------------------------------------ */

/* Whether a file has xattrs that would have to be looked at. */
static int has_xattrs(int file)
{
    static const char ignored[] = "security.selinux";
    char names[sizeof ignored];
    ssize_t length = flistxattr(file, names, sizeof names);
    if (length < 0)
        return errno != EOPNOTSUPP;
    return length != 0 && (length != sizeof ignored || memcmp(names, ignored, sizeof ignored));
}

static int copy_bytes(int source, int target)
{
    char *buffer = malloc(BUFFER);
    off_t at = 0;
    ssize_t got = -1;
    if (buffer == NULL)
        return -1;
    while ((got = pread(source, buffer, BUFFER, at)) > 0) {
        for (ssize_t done = 0, put; done < got; done += put, at += put) {
            if ((put = pwrite(target, buffer + done, (size_t)(got - done), at)) <= 0) {
                free(buffer);
                return -1;
            }
        }
    }
    free(buffer);
    return got < 0 ? -1 : 0;
}

static int copy_content(int source, const struct stat *s, int target, int again)
{
    if (again) {
        struct stat t;
        if (fstat(target, &t) || (t.st_size > s->st_size && ftruncate(target, 0)))
            return -1;
    }
    if (s->st_size == 0)
        return 0;
    if (ioctl(target, FICLONE, source) != 0) {
        int holes = s->st_blocks * 512 < s->st_size;
        return again || holes || s->st_size > SMALL ? -1 : copy_bytes(source, target);
    }
    struct stat t;
    if (again && (fstat(target, &t) || (t.st_size != s->st_size && ftruncate(target, s->st_size))))
        return -1;
    return 0;
}

static int copy_metadata(int target, const struct stat *s)
{
    struct stat t;
    struct timespec times[2] = {s->st_atim, s->st_mtim};
    if (fstat(target, &t))
        return -1;
    int moved = t.st_uid != s->st_uid || t.st_gid != s->st_gid;
    /* chown before chmod: it takes setuid away */
    return (moved && fchown(target, s->st_uid, s->st_gid)) ||
           ((moved || t.st_mode != s->st_mode) && fchmod(target, s->st_mode & 07777)) ||
           futimens(target, times);
}

static int is_plain(int file, struct stat *s)
{
    return fstat(file, s) == 0 && S_ISREG(s->st_mode) && s->st_nlink == 1 && !has_xattrs(file);
}

/* Copy one plain file; -1 where it is something else or cannot be, a new target gone again. */
static int copy_file(int source, int target, const char *name, int again)
{
    struct stat s, t;
    int failed = -1, to = -1;
    int from = openat(source, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (from < 0)
        return -1;
    if (!is_plain(from, &s))
        goto done;
    int how = again ? O_NONBLOCK : O_CREAT | O_EXCL;
    to = openat(target, name, O_WRONLY | O_NOFOLLOW | O_CLOEXEC | how, 0600);
    if (to < 0)
        goto done;
    failed = !is_plain(to, &t) || copy_content(from, &s, to, again) || copy_metadata(to, &s);
    if (close(to) != 0)
        failed = -1;
    if (failed && !again)
        unlinkat(target, name, 0);
done:
    close(from);
    return failed ? -1 : 0;
}

/* -- comparisons ------------------------------------------------------------------------- */

/* Flags under which an address says nothing, and those that say nothing of the content. */
#define NEVER_SAME                                                                             \
    (FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC | FIEMAP_EXTENT_ENCODED |                  \
     FIEMAP_EXTENT_DATA_ENCRYPTED | FIEMAP_EXTENT_NOT_ALIGNED | FIEMAP_EXTENT_DATA_INLINE |    \
     FIEMAP_EXTENT_DATA_TAIL)
#define IRRELEVANT (FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED | FIEMAP_EXTENT_SHARED)
#define EXTENTS 64

typedef struct {
    struct fiemap head;
    struct fiemap_extent extents[EXTENTS];
} Map;

static int read_map(int file, uint64_t start, Map *map)
{
    memset(&map->head, 0, sizeof map->head);
    map->head.fm_start = start;
    map->head.fm_length = FIEMAP_MAX_OFFSET - start;
    map->head.fm_extent_count = EXTENTS;
    return ioctl(file, FS_IOC_FIEMAP, map);
}

static int same_extents(int one, int other)
{
    Map a, b;
    uint64_t start = 0;
    for (;;) {
        if (read_map(one, start, &a) || read_map(other, start, &b))
            return 0;
        if (a.head.fm_mapped_extents != b.head.fm_mapped_extents)
            return 0;
        if (a.head.fm_mapped_extents == 0)
            return 1;
        for (uint32_t index = 0; index < a.head.fm_mapped_extents; index++) {
            const struct fiemap_extent *x = &a.extents[index], *y = &b.extents[index];
            if (x->fe_logical != y->fe_logical || x->fe_physical != y->fe_physical ||
                x->fe_length != y->fe_length || (x->fe_flags | y->fe_flags) & NEVER_SAME ||
                (x->fe_flags ^ y->fe_flags) & ~IRRELEVANT)
                return 0;
            start = x->fe_logical + x->fe_length;
        }
    }
}

/* 0 where both are plain files that share all their content and have the same metadata. */
static int compare_file(int one, int other, const char *name, int unused)
{
    struct stat s, t;
    int same = 0, how = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
    int a = openat(one, name, how), b = a < 0 ? -1 : openat(other, name, how);
    if (b >= 0)
        same = is_plain(a, &s) && is_plain(b, &t) && s.st_mode == t.st_mode &&
               s.st_uid == t.st_uid && s.st_gid == t.st_gid && s.st_size == t.st_size &&
               s.st_mtim.tv_sec == t.st_mtim.tv_sec && s.st_mtim.tv_nsec == t.st_mtim.tv_nsec &&
               same_extents(a, b);
    if (a >= 0)
        close(a);
    if (b >= 0)
        close(b);
    return same ? 0 : -1;
}

/* -- batches ----------------------------------------------------------------------------- */

/* Those names for which work on both folders fails. */
static PyObject *batch(PyObject *const *args, int flag,
                       int (*work)(int, int, const char *, int))
{
    PyObject *names = NULL, *left = NULL;
    const char **texts = NULL;
    char *failed = NULL;
    int source = (int)PyLong_AsLong(args[0]), target = (int)PyLong_AsLong(args[1]);
    if (PyErr_Occurred() || (names = PySequence_Tuple(args[2])) == NULL)
        return NULL;
    Py_ssize_t total = PyTuple_GET_SIZE(names);
    texts = calloc((size_t)total + 1, sizeof *texts);
    failed = calloc((size_t)total + 1, 1);
    if (texts == NULL || failed == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t index = 0; index < total; index++) {
        PyObject *name = PyTuple_GET_ITEM(names, index);
        if (!PyBytes_Check(name)) {
            PyErr_SetString(PyExc_TypeError, "a name is not bytes");
            goto done;
        }
        texts[index] = PyBytes_AS_STRING(name);
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t index = 0; index < total; index++)
        failed[index] = work(source, target, texts[index], flag) != 0;
    Py_END_ALLOW_THREADS
    left = PyList_New(0);
    for (Py_ssize_t index = 0; left != NULL && index < total; index++)
        if (failed[index] && PyList_Append(left, PyTuple_GET_ITEM(names, index)) < 0)
            Py_CLEAR(left);
done:
    free(texts);
    free(failed);
    Py_DECREF(names);
    return left;
}

/* copy_files(source, target, names, again): those names that were not copied. */
static PyObject *copy_files(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "copy_files(source, target, names, again)");
        return NULL;
    }
    int again = PyObject_IsTrue(args[3]);
    return again < 0 ? NULL : batch(args, again, copy_file);
}

/* unlike_files(one, other, names): those names whose files are not known to be alike. */
static PyObject *unlike_files(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "unlike_files(one, other, names)");
        return NULL;
    }
    return batch(args, 0, compare_file);
}

static PyMethodDef methods[] = {
    {"scan", scan, METH_O, "The entries of a folder, each a record and its name."},
    {"scan_tree", scan_tree, METH_O, "The listings of a folder and of those below it."},
    {"split", split, METH_O, "The records of a listing by name."},
    {"copy_files", (PyCFunction)(void (*)(void))copy_files, METH_FASTCALL,
     "Copy plain files; the names of those that were not."},
    {"unlike_files", (PyCFunction)(void (*)(void))unlike_files, METH_FASTCALL,
     "The names of files that are not known to be alike in two folders."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
