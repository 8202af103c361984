/* What a request costs most in Python: making a stat_result and packing it again, and system
 * calls with names and flags.
 *
 * Each function lets go of the interpreter's lock around its system call.  The pure Python
 * versions in native.py define what they do; the same tests run on both.  Layouts of replies:
 * include/uapi/linux/fuse.h of Linux.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD
    struct stat status;
} Stat;

static PyTypeObject StatType;

/* -- attributes ------------------------------------------------------------------------ */

#define NUMBER(name, expression)                                                               \
    static PyObject *get_##name(PyObject *self, void *closure)                                 \
    {                                                                                          \
        const struct stat *s = &((Stat *)self)->status;                                        \
        return PyLong_FromUnsignedLongLong((unsigned long long)(expression));                  \
    }

static PyObject *nanoseconds(const struct timespec *t)
{
    if (t->tv_sec > -9000000000LL && t->tv_sec < 9000000000LL)
        return PyLong_FromLongLong((long long)t->tv_sec * 1000000000LL + t->tv_nsec);
    PyObject *seconds = PyLong_FromLongLong(t->tv_sec);
    PyObject *billion = PyLong_FromLong(1000000000L);
    PyObject *rest = PyLong_FromLong(t->tv_nsec);
    PyObject *whole = seconds && billion ? PyNumber_Multiply(seconds, billion) : NULL;
    PyObject *sum = whole && rest ? PyNumber_Add(whole, rest) : NULL;
    Py_XDECREF(seconds);
    Py_XDECREF(billion);
    Py_XDECREF(rest);
    Py_XDECREF(whole);
    return sum;
}

#define MOMENT(name, field)                                                                    \
    static PyObject *get_##name(PyObject *self, void *closure)                                 \
    {                                                                                          \
        return nanoseconds(&((Stat *)self)->status.field);                                     \
    }

NUMBER(st_mode, s->st_mode)
NUMBER(st_ino, s->st_ino)
NUMBER(st_dev, s->st_dev)
NUMBER(st_nlink, s->st_nlink)
NUMBER(st_uid, s->st_uid)
NUMBER(st_gid, s->st_gid)
NUMBER(st_rdev, s->st_rdev)
NUMBER(st_size, s->st_size)
NUMBER(st_blocks, s->st_blocks)
NUMBER(st_blksize, s->st_blksize)
MOMENT(st_atime_ns, st_atim)
MOMENT(st_mtime_ns, st_mtim)
MOMENT(st_ctime_ns, st_ctim)

#define FIELD(name) {#name, get_##name, NULL, NULL, NULL}

static PyGetSetDef stat_fields[] = {
    FIELD(st_mode),     FIELD(st_ino),      FIELD(st_dev),    FIELD(st_nlink),  FIELD(st_uid),
    FIELD(st_gid),      FIELD(st_rdev),     FIELD(st_size),   FIELD(st_blocks), FIELD(st_blksize),
    FIELD(st_atime_ns), FIELD(st_mtime_ns), FIELD(st_ctime_ns), {NULL}};

static PyTypeObject StatType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "lazarette.fuse._native.Stat",
    .tp_doc = "Attributes of a file, under the names of os.stat_result.",
    .tp_basicsize = sizeof(Stat),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_getset = stat_fields,
};

static PyObject *made(const struct stat *status)
{
    Stat *result = PyObject_New(Stat, &StatType);
    if (result != NULL)
        result->status = *status;
    return (PyObject *)result;
}

static int folder_of(PyObject *value, int *folder)
{
    if (value == Py_None) {
        *folder = AT_FDCWD;
        return 0;
    }
    long number = PyLong_AsLong(value);
    if (number == -1 && PyErr_Occurred())
        return -1;
    *folder = (int)number;
    return 0;
}

/* What a function gives whose system call with a name gave `result`. */
static PyObject *done(int result, PyObject *name)
{
    if (result != 0)
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, name);
    Py_RETURN_NONE;
}

/* status(folder, name, follow): as os.stat. */
static PyObject *status(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int folder, follow, result;
    struct stat s;
    if (count != 3 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "status(folder, name, follow)");
        return NULL;
    }
    if (folder_of(args[0], &folder) < 0 || (follow = PyObject_IsTrue(args[2])) < 0)
        return NULL;
    const char *name = PyBytes_AS_STRING(args[1]);
    Py_BEGIN_ALLOW_THREADS
    result = fstatat(folder, name, &s, follow ? 0 : AT_SYMLINK_NOFOLLOW);
    Py_END_ALLOW_THREADS
    if (result != 0)
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, args[1]);
    return made(&s);
}

/* seek(folder, name): attributes of an entry itself, None where there is none. */
static PyObject *seek(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int folder, result;
    struct stat s;
    if (count != 2 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "seek(folder, name)");
        return NULL;
    }
    if (folder_of(args[0], &folder) < 0)
        return NULL;
    const char *name = PyBytes_AS_STRING(args[1]);
    Py_BEGIN_ALLOW_THREADS
    result = fstatat(folder, name, &s, AT_SYMLINK_NOFOLLOW);
    Py_END_ALLOW_THREADS
    if (result == 0)
        return made(&s);
    if (errno == ENOENT)
        Py_RETURN_NONE;
    return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, args[1]);
}

/* opened(descriptor): as os.fstat. */
static PyObject *opened(PyObject *self, PyObject *argument)
{
    struct stat s;
    int result, descriptor = (int)PyLong_AsLong(argument);
    if (descriptor == -1 && PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = fstat(descriptor, &s);
    Py_END_ALLOW_THREADS
    if (result != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return made(&s);
}

/* -- names ------------------------------------------------------------------------------- */

/* open_at(folder, name, flags, mode): openat(2), closed on exec. */
static PyObject *open_at(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int folder, descriptor;
    if (count != 4 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "open_at(folder, name, flags, mode)");
        return NULL;
    }
    if (folder_of(args[0], &folder) < 0)
        return NULL;
    const char *name = PyBytes_AS_STRING(args[1]);
    int flags = (int)PyLong_AsLong(args[2]) | O_CLOEXEC;
    mode_t mode = (mode_t)PyLong_AsLong(args[3]);
    if (PyErr_Occurred())
        return NULL;
    do {
        Py_BEGIN_ALLOW_THREADS
        descriptor = openat(folder, name, flags, mode);
        Py_END_ALLOW_THREADS
    } while (descriptor < 0 && errno == EINTR && PyErr_CheckSignals() == 0);
    if (descriptor >= 0)
        return PyLong_FromLong(descriptor);
    return PyErr_Occurred() ? NULL : PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, args[1]);
}

/* remove_file(folder, name): unlinkat(2). */
static PyObject *remove_file(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int folder, result;
    if (count != 2 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "remove_file(folder, name)");
        return NULL;
    }
    if (folder_of(args[0], &folder) < 0)
        return NULL;
    const char *name = PyBytes_AS_STRING(args[1]);
    Py_BEGIN_ALLOW_THREADS
    result = unlinkat(folder, name, 0);
    Py_END_ALLOW_THREADS
    return done(result, args[1]);
}

/* -- backing files ------------------------------------------------------------------------ */

/* As in <linux/fuse.h> of Linux 6.9, which older systems do not have. */
struct backing_map {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};
#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)

/* backing_open(device, fd): the id of a registered backing file. */
static PyObject *backing_open(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int result;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "backing_open(device, fd)");
        return NULL;
    }
    int device = (int)PyLong_AsLong(args[0]);
    struct backing_map map = {.fd = (int32_t)PyLong_AsLong(args[1])};
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = ioctl(device, BACKING_OPEN, &map);
    Py_END_ALLOW_THREADS
    return result < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(result);
}

/* backing_close(device, backing) */
static PyObject *backing_close(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int result;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "backing_close(device, backing)");
        return NULL;
    }
    int device = (int)PyLong_AsLong(args[0]);
    uint32_t backing = (uint32_t)PyLong_AsLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = ioctl(device, BACKING_CLOSE, &backing);
    Py_END_ALLOW_THREADS
    if (result < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

/* -- replies ---------------------------------------------------------------------------- */

static uint32_t encoded_device(dev_t device)
{
    uint32_t low = minor(device);
    return (low & 0xff) | (major(device) << 8) | ((low & ~0xffu) << 12);
}

static int number_of(PyObject *object, const char *name, unsigned long long *value)
{
    PyObject *number = PyObject_GetAttrString(object, name);
    if (number == NULL)
        return -1;
    *value = PyLong_AsUnsignedLongLongMask(number);
    Py_DECREF(number);
    return *value == (unsigned long long)-1 && PyErr_Occurred() ? -1 : 0;
}

static int moment_of(PyObject *object, const char *name, struct timespec *moment)
{
    PyObject *total = PyObject_GetAttrString(object, name);
    PyObject *billion = PyLong_FromLong(1000000000L);
    PyObject *pair = total && billion ? PyNumber_Divmod(total, billion) : NULL;
    Py_XDECREF(total);
    Py_XDECREF(billion);
    if (pair == NULL)
        return -1;
    moment->tv_sec = (time_t)PyLong_AsLongLong(PyTuple_GET_ITEM(pair, 0));
    moment->tv_nsec = PyLong_AsLong(PyTuple_GET_ITEM(pair, 1));
    Py_DECREF(pair);
    return PyErr_Occurred() ? -1 : 0;
}

/* Any object with the names of os.stat_result; ours without asking it. */
static int status_of(PyObject *object, struct stat *s)
{
    unsigned long long mode, uid, gid, rdev, size, blocks, block;
    if (Py_IS_TYPE(object, &StatType)) {
        *s = ((Stat *)object)->status;
        return 0;
    }
    if (number_of(object, "st_mode", &mode) || number_of(object, "st_uid", &uid) ||
        number_of(object, "st_gid", &gid) || number_of(object, "st_rdev", &rdev) ||
        number_of(object, "st_size", &size) || number_of(object, "st_blocks", &blocks) ||
        number_of(object, "st_blksize", &block) ||
        moment_of(object, "st_atime_ns", &s->st_atim) ||
        moment_of(object, "st_mtime_ns", &s->st_mtim) ||
        moment_of(object, "st_ctime_ns", &s->st_ctim))
        return -1;
    s->st_mode = (mode_t)mode;
    s->st_uid = (uid_t)uid;
    s->st_gid = (gid_t)gid;
    s->st_rdev = (dev_t)rdev;
    s->st_size = (off_t)size;
    s->st_blocks = (blkcnt_t)blocks;
    s->st_blksize = (blksize_t)block;
    return 0;
}

static void fill(struct fuse_attr *attr, const struct stat *s, uint64_t ino, uint32_t links)
{
    attr->ino = ino;
    attr->size = (uint64_t)s->st_size;
    attr->blocks = (uint64_t)s->st_blocks;
    attr->atime = (uint64_t)s->st_atim.tv_sec;
    attr->mtime = (uint64_t)s->st_mtim.tv_sec;
    attr->ctime = (uint64_t)s->st_ctim.tv_sec;
    attr->atimensec = (uint32_t)s->st_atim.tv_nsec;
    attr->mtimensec = (uint32_t)s->st_mtim.tv_nsec;
    attr->ctimensec = (uint32_t)s->st_ctim.tv_nsec;
    attr->mode = s->st_mode;
    attr->nlink = links;
    attr->uid = s->st_uid;
    attr->gid = s->st_gid;
    attr->rdev = s->st_rdev ? encoded_device(s->st_rdev) : 0;
    attr->blksize = (uint32_t)s->st_blksize;
}

static int unsigned_of(PyObject *const *args, int count, unsigned long long *values)
{
    for (int index = 0; index < count; index++) {
        values[index] = PyLong_AsUnsignedLongLong(args[index]);
        if (values[index] == (unsigned long long)-1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* entry_reply(node, ino, status, nlink, entry_ttl, attr_ttl) */
static PyObject *entry_reply(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct stat s;
    unsigned long long head[2], tail[3];
    struct fuse_entry_out out;
    if (count != 6) {
        PyErr_SetString(PyExc_TypeError, "entry_reply takes six arguments");
        return NULL;
    }
    if (unsigned_of(args, 2, head) || unsigned_of(args + 3, 3, tail) || status_of(args[2], &s))
        return NULL;
    memset(&out, 0, sizeof out);
    out.nodeid = head[0];
    out.entry_valid = tail[1];
    out.attr_valid = tail[2];
    fill(&out.attr, &s, head[1], (uint32_t)tail[0]);
    return PyBytes_FromStringAndSize((const char *)&out, sizeof out);
}

static PyObject *packed_attr(const struct stat *s, uint64_t ino, uint32_t links, uint64_t ttl)
{
    struct fuse_attr_out out;
    memset(&out, 0, sizeof out);
    out.attr_valid = ttl;
    fill(&out.attr, s, ino, links);
    return PyBytes_FromStringAndSize((const char *)&out, sizeof out);
}

/* attr_reply(ino, status, nlink, ttl) */
static PyObject *attr_reply(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct stat s;
    unsigned long long ino, tail[2];
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "attr_reply takes four arguments");
        return NULL;
    }
    if (unsigned_of(args, 1, &ino) || unsigned_of(args + 2, 2, tail) || status_of(args[1], &s))
        return NULL;
    return packed_attr(&s, ino, (uint32_t)tail[0], tail[1]);
}

/* attr_of(descriptor, ino, nlink, ttl): the attributes of an open file, packed; its own count of
 * links for a negative one. */
static PyObject *attr_of(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct stat s;
    unsigned long long ino, ttl;
    int result;
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "attr_of takes four arguments");
        return NULL;
    }
    int descriptor = (int)PyLong_AsLong(args[0]);
    long links = PyLong_AsLong(args[2]);
    if (PyErr_Occurred() || unsigned_of(args + 1, 1, &ino) || unsigned_of(args + 3, 1, &ttl))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = fstat(descriptor, &s);
    Py_END_ALLOW_THREADS
    if (result != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return packed_attr(&s, ino, links < 0 ? (uint32_t)s.st_nlink : (uint32_t)links, ttl);
}

/* attr_at(folder, name, follow, ino, nlink, ttl): as attr_of, of a file below a folder. */
static PyObject *attr_at(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct stat s;
    unsigned long long ino, ttl;
    int folder, follow, result;
    if (count != 6 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "attr_at takes six arguments");
        return NULL;
    }
    if (folder_of(args[0], &folder) < 0 || (follow = PyObject_IsTrue(args[2])) < 0)
        return NULL;
    long links = PyLong_AsLong(args[4]);
    if (PyErr_Occurred() || unsigned_of(args + 3, 1, &ino) || unsigned_of(args + 5, 1, &ttl))
        return NULL;
    const char *name = PyBytes_AS_STRING(args[1]);
    Py_BEGIN_ALLOW_THREADS
    result = fstatat(folder, name, &s, follow ? 0 : AT_SYMLINK_NOFOLLOW);
    Py_END_ALLOW_THREADS
    if (result != 0)
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, args[1]);
    return packed_attr(&s, ino, links < 0 ? (uint32_t)s.st_nlink : (uint32_t)links, ttl);
}

/* answer(device, unique, body): header and body in one write. */
static PyObject *answer(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    ssize_t written;
    if (count != 3 || !PyBytes_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "answer(device, unique, body)");
        return NULL;
    }
    int device = (int)PyLong_AsLong(args[0]);
    struct fuse_out_header header = {.error = 0};
    header.unique = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    struct iovec parts[2] = {
        {&header, sizeof header},
        {PyBytes_AS_STRING(args[2]), (size_t)PyBytes_GET_SIZE(args[2])},
    };
    header.len = (uint32_t)(sizeof header + parts[1].iov_len);
    Py_BEGIN_ALLOW_THREADS
    written = writev(device, parts, parts[1].iov_len ? 2 : 1);
    Py_END_ALLOW_THREADS
    if (written < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

/* -- times ------------------------------------------------------------------------------ */

/* set_times(folder, name, follow, atime_s, atime_ns, mtime_s, mtime_ns): utimensat(2). */
static PyObject *set_times(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int folder, follow, result;
    struct timespec times[2];
    if (count != 7 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "set_times takes seven arguments");
        return NULL;
    }
    if (folder_of(args[0], &folder) < 0 || (follow = PyObject_IsTrue(args[2])) < 0)
        return NULL;
    for (int index = 0; index < 2; index++) {
        times[index].tv_sec = (time_t)PyLong_AsLongLong(args[3 + 2 * index]);
        times[index].tv_nsec = PyLong_AsLong(args[4 + 2 * index]);
    }
    if (PyErr_Occurred())
        return NULL;
    const char *name = PyBytes_AS_STRING(args[1]);
    Py_BEGIN_ALLOW_THREADS
    result = utimensat(folder, name, times, follow ? 0 : AT_SYMLINK_NOFOLLOW);
    Py_END_ALLOW_THREADS
    return done(result, args[1]);
}

/* set_owner(folder, name, follow, uid, gid): fchownat(2); -1 leaves one as it is. */
static PyObject *set_owner(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int folder, follow, result;
    if (count != 5 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "set_owner(folder, name, follow, uid, gid)");
        return NULL;
    }
    if (folder_of(args[0], &folder) < 0 || (follow = PyObject_IsTrue(args[2])) < 0)
        return NULL;
    uid_t uid = (uid_t)PyLong_AsLongLong(args[3]);
    gid_t gid = (gid_t)PyLong_AsLongLong(args[4]);
    if (PyErr_Occurred())
        return NULL;
    const char *name = PyBytes_AS_STRING(args[1]);
    Py_BEGIN_ALLOW_THREADS
    result = fchownat(folder, name, uid, gid, follow ? 0 : AT_SYMLINK_NOFOLLOW);
    Py_END_ALLOW_THREADS
    return done(result, args[1]);
}

/* set_mode(folder, name, mode): fchmodat(2), which follows a final link. */
static PyObject *set_mode(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int folder, result;
    if (count != 3 || !PyBytes_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "set_mode(folder, name, mode)");
        return NULL;
    }
    if (folder_of(args[0], &folder) < 0)
        return NULL;
    mode_t mode = (mode_t)PyLong_AsLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    const char *name = PyBytes_AS_STRING(args[1]);
    Py_BEGIN_ALLOW_THREADS
    result = fchmodat(folder, name, mode, 0);
    Py_END_ALLOW_THREADS
    return done(result, args[1]);
}

#define METHOD(name, text) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, text}

static PyMethodDef methods[] = {
    METHOD(status, "Attributes of a file below a folder."),
    METHOD(seek, "Attributes of an entry, or None."),
    {"opened", opened, METH_O, "Attributes of an open file."},
    METHOD(open_at, "Open a file below a folder."),
    METHOD(remove_file, "Remove a name below a folder."),
    METHOD(backing_open, "Register a backing file."),
    METHOD(backing_close, "Give a backing id back."),
    METHOD(entry_reply, "Pack struct fuse_entry_out."),
    METHOD(attr_reply, "Pack struct fuse_attr_out."),
    METHOD(attr_of, "Pack the attributes of an open file."),
    METHOD(attr_at, "Pack the attributes of a file below a folder."),
    METHOD(answer, "Write a reply."),
    METHOD(set_times, "Set the times of a file."),
    METHOD(set_owner, "Set owner and group of a file."),
    METHOD(set_mode, "Set the mode of a file."),
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void)
{
    if (PyType_Ready(&StatType) < 0)
        return NULL;
    PyObject *created = PyModule_Create(&module);
    if (created != NULL && PyModule_AddObjectRef(created, "Stat", (PyObject *)&StatType) < 0)
        Py_CLEAR(created);
    return created;
}
