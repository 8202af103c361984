/* Reading requests, taking them apart, and answering: the loop of serving.py.
 *
 * The pure Python version there defines what it does; the same tests run on both.  Layouts:
 * include/uapi/linux/fuse.h of Linux.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOT_BEGUN, UNUSUAL, NOT_ACCEPTED, UNHINDERED };
enum { RUN = 256, BLOCKED = 2 };
enum { MOST_ARGUMENTS = 16, MOST_NAMES = 2, SMALL = 4096 };
/* Items of a route: see serving.Route. */
enum { HANDLER, METHOD, ONCE, FORMAT, MAKE, NAMES, ROUTE_ITEMS };

/* Fixed fields, in the characters of the struct module: I, Q, and padding as 4x. */
static int fields_of(const char *format, const char **at, const char *end, PyObject **values)
{
    int made = 0;
    const char *body = *at;
    for (; *format; format++) {
        Py_ssize_t size = *format == 'Q' ? 8 : 4;
        if (*format == '=')
            continue;
        if (body + size > end || made == MOST_ARGUMENTS) {
            PyErr_SetString(PyExc_ValueError, "request is too short");
            break;
        }
        if (*format == 'Q') {
            uint64_t value;
            memcpy(&value, body, sizeof value);
            values[made] = PyLong_FromUnsignedLongLong(value);
        } else if (*format == 'I') {
            uint32_t value;
            memcpy(&value, body, sizeof value);
            values[made] = PyLong_FromUnsignedLong(value);
        } else if (format[0] == '4' && format[1] == 'x') {
            format++;
            body += 4;
            continue;
        } else {
            PyErr_Format(PyExc_ValueError, "unknown field %c", *format);
            break;
        }
        body += size;
        if (values[made] == NULL)
            break;
        made++;
    }
    if (!PyErr_Occurred()) {
        *at = body;
        return made;
    }
    while (made > 0)
        Py_DECREF(values[--made]);
    return -1;
}

/* The arguments of a request's method after the first: what its body says.  How many; -1. */
static int arguments_of(PyObject *route, const char *body, const char *end, PyObject **arguments)
{
    PyObject *make = PyTuple_GET_ITEM(route, MAKE);
    const char *format = PyBytes_AsString(PyTuple_GET_ITEM(route, FORMAT));
    long names = PyLong_AsLong(PyTuple_GET_ITEM(route, NAMES));
    if (format == NULL || (names == -1 && PyErr_Occurred()))
        return -1;
    int made = fields_of(format, &body, end, arguments);
    if (made > 0 && make != Py_None) {
        PyObject *whole = PyObject_Vectorcall(make, arguments, (size_t)made, NULL);
        while (made > 0)
            Py_DECREF(arguments[--made]);
        if (whole == NULL)
            return -1;
        arguments[made++] = whole;
    }
    for (; made >= 0 && names > 0; names--) {
        const char *stop = memchr(body, 0, (size_t)(end - body));
        PyObject *name = NULL;
        if (stop == NULL)
            PyErr_SetString(PyExc_ValueError, "name does not end");
        else
            name = PyBytes_FromStringAndSize(body, stop - body);
        if (name == NULL) {
            while (made > 0)
                Py_DECREF(arguments[--made]);
            return -1;
        }
        arguments[made++] = name;
        body = stop + 1;
    }
    return made;
}

static PyObject *header_of(PyObject *make, const struct fuse_in_header *in)
{
    uint16_t last[2]; /* one field in older headers */
    memcpy(last, (const char *)in + 36, sizeof last);
    uint64_t numbers[9] = {in->len, in->opcode, in->unique, in->nodeid, in->uid,
                           in->gid, in->pid,    last[0],    last[1]};
    PyObject *values[9];
    PyObject *request = NULL;
    int made = 0;
    while (made < 9 && (values[made] = PyLong_FromUnsignedLongLong(numbers[made])) != NULL)
        made++;
    if (made == 9)
        request = PyObject_Vectorcall(make, values, 9, NULL);
    while (made > 0)
        Py_DECREF(values[--made]);
    return request;
}

/* What a method raised, taken off the thread: the number of an OSError, or 0 with the object; -1
 * when it is nothing a request should raise, which then stays on the thread. */
static int raised(PyObject **exception)
{
    PyObject *type, *trace;
    int number = 0;
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyErr_Fetch(&type, exception, &trace);
    PyErr_NormalizeException(&type, exception, &trace);
    if (trace != NULL)
        PyException_SetTraceback(*exception, trace);
    if (PyErr_GivenExceptionMatches(type, PyExc_OSError)) {
        PyObject *code = PyObject_GetAttrString(*exception, "errno");
        if (code != NULL && PyLong_Check(code))
            number = (int)PyLong_AsLong(code);
        if (number <= 0)
            number = EIO;
        Py_XDECREF(code);
        PyErr_Clear();
        Py_CLEAR(*exception);
    }
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return number;
}

/* What a request calls each time, looked up once. */
typedef struct {
    PyObject *acquire, *release, *commit, *done, *enter, *leave;
} Calls;

static int call(PyObject *function)
{
    PyObject *result = PyObject_CallNoArgs(function);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

static int note_reply(PyObject *done, uint64_t unique, PyObject *reply)
{
    PyObject *number = PyLong_FromUnsignedLongLong(unique);
    PyObject *arguments[2] = {number, reply};
    PyObject *result = NULL;
    if (number != NULL)
        result = PyObject_Vectorcall(done, arguments, 2, NULL);
    Py_XDECREF(number);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* 0; why the reply was refused. */
static int send_reply(int device, uint64_t unique, int number, PyObject *body)
{
    int refused;
    struct fuse_out_header header = {.error = -number, .unique = unique};
    struct iovec parts[2] = {{&header, sizeof header}, {NULL, 0}};
    if (body != NULL) {
        parts[1].iov_base = PyBytes_AS_STRING(body);
        parts[1].iov_len = (size_t)PyBytes_GET_SIZE(body);
    }
    header.len = (uint32_t)(sizeof header + parts[1].iov_len);
    if (header.len <= SMALL) /* quicker than letting another thread run */
        return writev(device, parts, parts[1].iov_len ? 2 : 1) < 0 ? errno : 0;
    Py_BEGIN_ALLOW_THREADS
    refused = writev(device, parts, 2) < 0 ? errno : 0;
    Py_END_ALLOW_THREADS
    return refused;
}

/* Whether a method gave a Sync, and this thread may block for it; -1 when asking failed. */
static int may_sync(const Calls *calls, PyObject *outcome)
{
    if (outcome == NULL || !PyTuple_Check(outcome))
        return 0;
    if (PyTuple_GET_SIZE(outcome) != 2) {
        PyErr_SetString(PyExc_TypeError, "not a descriptor and whether data is enough");
        return -1;
    }
    PyObject *may = PyObject_CallNoArgs(calls->enter);
    int result = may == NULL ? -1 : PyObject_IsTrue(may);
    Py_XDECREF(may);
    return result;
}

/* Write a descriptor out, close it, and answer.  0; why the reply was refused; -1: raised. */
static int sync_and_reply(int device, uint64_t unique, const Calls *calls, PyObject *sync)
{
    int fd = (int)PyLong_AsLong(PyTuple_GET_ITEM(sync, 0));
    int data_only = PyObject_IsTrue(PyTuple_GET_ITEM(sync, 1));
    int failed, refused;
    struct fuse_out_header header = {.len = sizeof header, .unique = unique};
    if (PyErr_Occurred())
        return -1;
    Py_BEGIN_ALLOW_THREADS
    do
        failed = data_only ? fdatasync(fd) : fsync(fd);
    while (failed < 0 && errno == EINTR);
    header.error = failed < 0 ? -errno : 0;
    close(fd);
    refused = write(device, &header, sizeof header) < 0 ? errno : 0;
    Py_END_ALLOW_THREADS
    if (call(calls->leave) < 0)
        return -1;
    return refused;
}

/* Read one request and answer it.  1: done, go on; BLOCKED: likewise, after a Sync; 0: `result` is
 * for the caller; -1: raised. */
static int serve_one(int device, Py_buffer *buffer, PyObject *routes, PyObject *make,
                     const Calls *calls, PyObject **result)
{
    ssize_t size;
    if (PyErr_CheckSignals() < 0) /* one may have come since the last method ran */
        return -1;
    Py_BEGIN_ALLOW_THREADS
    size = read(device, buffer->buf, (size_t)buffer->len);
    Py_END_ALLOW_THREADS
    if (size < 0) {
        if (errno == EINTR)
            return 1;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    const char *start = buffer->buf;
    struct fuse_in_header in;
    if (size < (ssize_t)sizeof in) {
        PyErr_SetString(PyExc_ValueError, "request is too short");
        return -1;
    }
    memcpy(&in, start, sizeof in);
    PyObject *route = Py_None;
    if (in.opcode < (uint32_t)PyList_GET_SIZE(routes))
        route = PyList_GET_ITEM(routes, in.opcode);
    PyObject *request = header_of(make, &in);
    if (request == NULL)
        return -1;
    if (route == Py_None || in.unique >> 63) {
        *result = Py_BuildValue("(NniO)", request, (Py_ssize_t)size, NOT_BEGUN, Py_None);
        return *result == NULL ? -1 : 0;
    }
    if (!PyTuple_Check(route) || PyTuple_GET_SIZE(route) != ROUTE_ITEMS) {
        PyErr_SetString(PyExc_TypeError, "not a route");
        Py_DECREF(request);
        return -1;
    }
    PyObject *outcome = NULL, *method = PyTuple_GET_ITEM(route, METHOD);
    PyObject *arguments[MOST_ARGUMENTS + MOST_NAMES + 2];
    int count, number = 0, failed = 0, refused = 0;
    arguments[0] = request;
    if (call(calls->acquire) < 0) {
        Py_DECREF(request);
        return -1;
    }
    if (method == Py_None) {
        method = PyTuple_GET_ITEM(route, HANDLER);
        count = 1;
        PyObject *whole = PyMemoryView_FromObject(buffer->obj);
        arguments[1] = whole ? PySequence_GetSlice(whole, sizeof in, size) : NULL;
        Py_XDECREF(whole);
        if (arguments[1] == NULL)
            count = -1;
    } else {
        count = arguments_of(route, start + sizeof in, start + size, arguments + 1);
    }
    if (count >= 0)
        outcome = PyObject_Vectorcall(method, arguments, (size_t)count + 1, NULL);
    while (count > 0)
        Py_DECREF(arguments[count--]);
    if (outcome == NULL)
        number = raised(&outcome);
    else if (PyLong_CheckExact(outcome)) {
        number = (int)PyLong_AsLong(outcome);
        Py_CLEAR(outcome);
    }
    if (number < 0) {
        Py_DECREF(request);
        return -1;
    }
    int blocks = may_sync(calls, outcome);
    if (blocks < 0) {
        Py_XDECREF(outcome);
        Py_DECREF(request);
        return -1;
    }
    if (number == 0 && outcome != Py_None && !PyBytes_CheckExact(outcome) && !blocks) {
        *result = Py_BuildValue("(NniN)", request, (Py_ssize_t)size, UNUSUAL, outcome);
        return *result == NULL ? -1 : 0;
    }
    if (number == 0 && outcome != Py_None && !blocks && PyTuple_GET_ITEM(route, ONCE) == Py_True)
        failed = note_reply(calls->done, in.unique, outcome);
    if (failed || call(calls->commit) < 0 || call(calls->release) < 0) {
        Py_XDECREF(outcome);
        Py_DECREF(request);
        return -1;
    }
    if (blocks)
        refused = sync_and_reply(device, in.unique, calls, outcome);
    else if (outcome != Py_None)
        refused = send_reply(device, in.unique, number, number ? NULL : outcome);
    Py_XDECREF(outcome);
    if (refused > 0) {
        PyObject *error = PyObject_CallFunction(PyExc_OSError, "is", refused, strerror(refused));
        *result = Py_BuildValue("(NniN)", request, (Py_ssize_t)size, NOT_ACCEPTED, error);
        return *result == NULL ? -1 : 0;
    }
    Py_DECREF(request);
    return refused ? -1 : blocks ? BLOCKED : 1;
}

/* serve(device, buffer, routes, make, lock, journal, readers) */
static PyObject *serve(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Py_buffer buffer;
    PyObject *result = NULL;
    int outcome, left = RUN;
    if (count != 7 || !PyList_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError,
                        "serve(device, buffer, routes, make, lock, journal, readers)");
        return NULL;
    }
    int device = (int)PyLong_AsLong(args[0]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &buffer, PyBUF_WRITABLE) < 0)
        return NULL;
    Calls calls = {
        PyObject_GetAttrString(args[4], "acquire"),
        PyObject_GetAttrString(args[4], "release"),
        PyObject_GetAttrString(args[5], "commit"),
        PyObject_GetAttrString(args[5], "done"),
        PyObject_GetAttrString(args[6], "enter"),
        PyObject_GetAttrString(args[6], "leave"),
    };
    if (calls.acquire && calls.release && calls.commit && calls.done && calls.enter && calls.leave)
        do {
            outcome = serve_one(device, &buffer, args[2], args[3], &calls, &result);
            left = outcome == BLOCKED ? RUN : left - 1;
            if (outcome > 0 && left == 0)
                result = Py_BuildValue("(OniO)", Py_None, (Py_ssize_t)0, UNHINDERED, Py_None);
        } while (outcome > 0 && left > 0);
    Py_XDECREF(calls.acquire);
    Py_XDECREF(calls.release);
    Py_XDECREF(calls.commit);
    Py_XDECREF(calls.done);
    Py_XDECREF(calls.enter);
    Py_XDECREF(calls.leave);
    PyBuffer_Release(&buffer);
    return result;
}

static PyMethodDef methods[] = {
    {"serve", (PyCFunction)(void (*)(void))serve, METH_FASTCALL, "Read requests and answer them."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_serving", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__serving(void)
{
    return PyModule_Create(&module);
}
