/* Writing records of a journal: see records.py, whose pure Python version defines what this does;
 * the same tests run on both.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* What a journal's region is made of: see records.RegionPlain. */
typedef struct {
    PyObject_HEAD
    Py_buffer data;
    Py_buffer words;
    Py_ssize_t word, start, head, at;
} Region;

static PyTypeObject RegionType;

static PyObject *region_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *data, *words;
    Py_ssize_t word, start, length;
    if (!PyArg_ParseTuple(args, "OOnnn", &data, &words, &word, &start, &length))
        return NULL;
    Region *region = (Region *)type->tp_alloc(type, 0);
    if (region == NULL)
        return NULL;
    if (PyObject_GetBuffer(data, &region->data, PyBUF_WRITABLE) < 0 ||
        PyObject_GetBuffer(words, &region->words, PyBUF_WRITABLE) < 0) {
        Py_DECREF(region);
        return NULL;
    }
    if (word < 0 || (word + 1) * 8 > region->words.len || length > region->data.len) {
        PyErr_SetString(PyExc_ValueError, "the head or its word is outside");
        Py_DECREF(region);
        return NULL;
    }
    region->word = word;
    region->start = start;
    region->head = region->at = length;
    return (PyObject *)region;
}

static void region_dealloc(PyObject *self)
{
    PyBuffer_Release(&((Region *)self)->data);
    PyBuffer_Release(&((Region *)self)->words);
    Py_TYPE(self)->tp_free(self);
}

/* Room for a record of so many bytes, or NULL: then the region is full until it is replaced. */
static char *room(Region *region, Py_ssize_t size)
{
    Py_ssize_t at = region->at;
    if (at + size > region->data.len) {
        region->at = region->data.len + 1;
        return NULL;
    }
    region->at = at + size;
    return (char *)region->data.buf + at;
}

/* Frame and numbers of a record, packed as the struct module does with "=IBQQ". */
static int put_numbers(Region *region, PyObject *const *args, Py_ssize_t count, PyObject *tail)
{
    uint64_t numbers[2];
    long kind = PyLong_AsLong(args[0]);
    Py_ssize_t extra = tail == NULL ? 0 : PyBytes_GET_SIZE(tail);
    Py_ssize_t size = 5 + 8 * (count - 1) + extra;
    for (Py_ssize_t index = 1; index < count; index++)
        numbers[index - 1] = PyLong_AsUnsignedLongLong(args[index]);
    if (PyErr_Occurred())
        return -1;
    char *place = room(region, size);
    if (place == NULL)
        return 0;
    uint32_t length = (uint32_t)size;
    memcpy(place, &length, 4);
    place[4] = (char)kind;
    memcpy(place + 5, numbers, (size_t)(8 * (count - 1)));
    if (extra)
        memcpy(place + 5 + 8 * (count - 1), PyBytes_AS_STRING(tail), (size_t)extra);
    return 0;
}

static PyObject *region_one(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "one(kind, number)");
        return NULL;
    }
    if (put_numbers((Region *)self, args, 2, NULL) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *region_pair(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "pair(kind, first, second)");
        return NULL;
    }
    if (put_numbers((Region *)self, args, 3, NULL) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *region_text(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 3 || !PyBytes_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "text(kind, number, body)");
        return NULL;
    }
    if (put_numbers((Region *)self, args, 2, args[2]) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *region_put(PyObject *self, PyObject *record)
{
    if (!PyBytes_Check(record)) {
        PyErr_SetString(PyExc_TypeError, "put(record)");
        return NULL;
    }
    char *place = room((Region *)self, PyBytes_GET_SIZE(record));
    if (place != NULL)
        memcpy(place, PyBytes_AS_STRING(record), (size_t)PyBytes_GET_SIZE(record));
    Py_RETURN_NONE;
}

/* file(id, ino, lookups, kind, flags, backing, backing_flags, device, real, orphan, parent, name):
 * a record of a file with one name, or with none where there is no parent. */
static PyObject *region_file(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    enum { ID, INO, LOOKUPS, KIND, FLAGS, BACKING, BACKING_FLAGS, DEVICE, REAL, ORPHAN, PARENT };
    unsigned long long numbers[PARENT + 1];
    if (count != PARENT + 2 || !PyBytes_Check(args[PARENT + 1])) {
        PyErr_SetString(PyExc_TypeError, "file takes twelve arguments");
        return NULL;
    }
    for (int index = 0; index <= PARENT; index++) {
        numbers[index] = PyLong_AsUnsignedLongLongMask(args[index]);
        if (numbers[index] == (unsigned long long)-1 && PyErr_Occurred())
            return NULL;
    }
    struct __attribute__((packed)) {
        uint32_t length;
        uint8_t record;
        uint64_t id, ino;
        int64_t lookups;
        uint32_t kind, flags;
        int32_t backing;
        uint32_t backing_flags;
        uint64_t successor, device, real;
        int32_t orphan, lower;
        uint32_t names;
        uint64_t parent;
        uint32_t size;
    } node = {
        .record = 2,
        .id = numbers[ID],
        .ino = numbers[INO],
        .lookups = (int64_t)numbers[LOOKUPS],
        .kind = (uint32_t)numbers[KIND],
        .flags = (uint32_t)numbers[FLAGS],
        .backing = (int32_t)numbers[BACKING],
        .backing_flags = (uint32_t)numbers[BACKING_FLAGS],
        .device = numbers[DEVICE],
        .real = numbers[REAL],
        .orphan = (int32_t)numbers[ORPHAN],
        .lower = -1,
        .names = numbers[PARENT] != 0,
        .parent = numbers[PARENT],
    };
    Py_ssize_t size = node.names ? PyBytes_GET_SIZE(args[PARENT + 1]) : 0;
    size_t fixed = sizeof node - (node.names ? 0 : sizeof node.parent + sizeof node.size);
    node.size = (uint32_t)size;
    node.length = (uint32_t)(fixed + (size_t)size);
    char *place = room((Region *)self, (Py_ssize_t)node.length);
    if (place != NULL) {
        memcpy(place, &node, fixed);
        memcpy(place + fixed, PyBytes_AS_STRING(args[PARENT + 1]), (size_t)size);
    }
    Py_RETURN_NONE;
}

/* handle(number, node, flags, fd, through): a record of an open file. */
static PyObject *region_handle(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    unsigned long long numbers[5];
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "handle(number, node, flags, fd, through)");
        return NULL;
    }
    for (int index = 0; index < 5; index++) {
        numbers[index] = PyLong_AsUnsignedLongLongMask(args[index]);
        if (numbers[index] == (unsigned long long)-1 && PyErr_Occurred())
            return NULL;
    }
    struct __attribute__((packed)) {
        uint32_t length;
        uint8_t record;
        uint64_t number, node;
        uint32_t flags;
        int32_t fd;
        uint32_t through;
    } handle = {
        sizeof handle, 8, numbers[0], numbers[1], (uint32_t)numbers[2], (int32_t)numbers[3],
        (uint32_t)numbers[4],
    };
    char *place = room((Region *)self, sizeof handle);
    if (place != NULL)
        memcpy(place, &handle, sizeof handle);
    Py_RETURN_NONE;
}

static PyObject *region_commit(PyObject *self, PyObject *nothing)
{
    Region *region = (Region *)self;
    if (region->at > region->data.len)
        Py_RETURN_FALSE;
    if (region->at != region->head) {
        region->head = region->at;
        /* One aligned store, after everything before it. */
        __atomic_store_n((uint64_t *)region->words.buf + region->word,
                         (uint64_t)(region->start + region->at), __ATOMIC_RELEASE);
    }
    Py_RETURN_TRUE;
}

static PyObject *region_close(PyObject *self, PyObject *nothing)
{
    Region *region = (Region *)self;
    PyBuffer_Release(&region->data);
    PyBuffer_Release(&region->words);
    region->data.len = 0;
    region->at = 1;
    Py_RETURN_NONE;
}

static PyMethodDef region_methods[] = {
    {"one", (PyCFunction)(void (*)(void))region_one, METH_FASTCALL, "A record of one number."},
    {"pair", (PyCFunction)(void (*)(void))region_pair, METH_FASTCALL, "A record of two numbers."},
    {"text", (PyCFunction)(void (*)(void))region_text, METH_FASTCALL, "A number and bytes."},
    {"put", region_put, METH_O, "A record as it is."},
    {"file", (PyCFunction)(void (*)(void))region_file, METH_FASTCALL, "A file."},
    {"handle", (PyCFunction)(void (*)(void))region_handle, METH_FASTCALL, "An open file."},
    {"commit", region_commit, METH_NOARGS, "Make what was put count; False when it is full."},
    {"close", region_close, METH_NOARGS, "Let go of the memory."},
    {NULL, NULL, 0, NULL}};

static PyTypeObject RegionType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "lazarette.fuse._native.Region",
    .tp_doc = "Records behind a head that one store moves.",
    .tp_basicsize = sizeof(Region),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = region_new,
    .tp_dealloc = region_dealloc,
    .tp_methods = region_methods,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_records", .m_size = -1};

PyMODINIT_FUNC PyInit__records(void)
{
    if (PyType_Ready(&RegionType) < 0)
        return NULL;
    PyObject *created = PyModule_Create(&module);
    if (created != NULL && PyModule_AddObjectRef(created, "Region", (PyObject *)&RegionType) < 0)
        Py_CLEAR(created);
    return created;
}
