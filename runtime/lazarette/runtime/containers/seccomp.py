"""The default system call filter: an allow-list, as the Engine documents its own.

Everything not listed fails with EPERM.  Some calls are allowed only to containers that
hold a capability, some only with harmless arguments.  A profile given by the user in
the Engine's JSON form (``--security-opt seccomp=…``) is turned into the runtime's form
by :func:`from_profile`.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Collection

import msgspec

from lazarette.fuse import jsontext
from lazarette.storage.errors import InvalidArgument

_ALLOWED_TEXT = """
accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32
clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2
dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64
fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat
fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64
fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64
futex_wait futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid getegid32
geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp
getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit
get_robust_list getrusage getsid getsockname getsockopt get_thread_area gettid gettimeofday
getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1
inotify_rm_watch io_cancel ioctl io_destroy io_getevents io_pgetevents io_pgetevents_time64
ioprio_get ioprio_set io_setup io_submit ipc kill landlock_add_rule landlock_create_ruleset
landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr
listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 madvise
map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock
mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive
mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget
msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat _newselect
open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free
pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease
pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv
recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename
renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64
rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam sched_get_priority_max
sched_get_priority_min sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select
semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg
sendto setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer
setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid
setreuid32 setrlimit set_robust_list setsid setsockopt set_thread_area set_tid_address setuid
setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4
sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs statfs64 statmount statx
symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate
truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64
utimes vfork vmsplice wait4 waitid waitpid write writev process_vm_readv process_vm_writev
ptrace arch_prctl modify_ldt
"""
ALLOWED = tuple(_ALLOWED_TEXT.split())

BY_CAPABILITY = {
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYS_ADMIN": (
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie "
        "lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount "
        "open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog "
        "umount umount2 unshare"
    ),
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module init_module finit_module",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "iopl ioperm",
    "CAP_SYS_TIME": "settimeofday stime clock_settime clock_settime64",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYSLOG": "syslog",
    "CAP_BPF": "bpf",
    "CAP_PERFMON": "perf_event_open",
}

_ARCHES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
    "riscv64": ["SCMP_ARCH_RISCV64"],
    "ppc64le": ["SCMP_ARCH_PPC64LE"],
    "s390x": ["SCMP_ARCH_S390X", "SCMP_ARCH_S390"],
}
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
_AF_VSOCK = 40
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET together.
_NAMESPACE_FLAGS = 0x7E020000

Filter = dict[str, object]


def _rule(names: list[str], action: str = "SCMP_ACT_ALLOW", **more: object) -> Filter:
    return {"names": names, "action": action, **more}


def default_filter(capabilities: Collection[str]) -> Filter:
    """The default filter for a container with these capabilities (OCI names)."""
    rules = [_rule(list(ALLOWED))]
    rules += [
        _rule(["personality"], args=[{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}])
        for value in _PERSONALITIES
    ]
    rules.append(_rule(["socket"], args=[{"index": 0, "value": _AF_VSOCK, "op": "SCMP_CMP_NE"}]))
    for capability, names in BY_CAPABILITY.items():
        if capability in capabilities:
            rules.append(_rule(names.split()))
    if "CAP_SYS_ADMIN" not in capabilities:
        harmless = {
            "index": 1 if platform.machine() == "s390x" else 0,
            "value": _NAMESPACE_FLAGS,
            "valueTwo": 0,
            "op": "SCMP_CMP_MASKED_EQ",
        }
        rules.append(_rule(["clone"], args=[harmless]))
        # ENOSYS makes a C library fall back to clone, whose flags a filter can read.
        rules.append(_rule(["clone3"], "SCMP_ACT_ERRNO", errnoRet=errno.ENOSYS))
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.EPERM,
        "architectures": _ARCHES.get(platform.machine(), []),
        "syscalls": rules,
    }


class _Argument(msgspec.Struct):
    index: int
    value: int
    op: str
    valueTwo: int = 0


class _Condition(msgspec.Struct):
    caps: list[str] | None = None
    arches: list[str] | None = None
    min_kernel: str = msgspec.field(default="", name="minKernel")


class _Syscalls(msgspec.Struct):
    action: str
    names: list[str] | None = None
    name: str = ""
    args: list[_Argument] | None = None
    errno: int | None = msgspec.field(default=None, name="errnoRet")
    includes: _Condition | None = None
    excludes: _Condition | None = None


class _Profile(msgspec.Struct):
    """The Engine's form, as its documentation of seccomp profiles has it."""

    default_action: str = msgspec.field(name="defaultAction")
    default_errno: int | None = msgspec.field(default=None, name="defaultErrnoRet")
    architectures: list[str] | None = None
    syscalls: list[_Syscalls] | None = None


def from_profile(text: str, capabilities: Collection[str]) -> Filter:
    """A profile in the Engine's JSON form as the runtime's filter.

    Raises:
        InvalidArgument: it is not such a profile.
    """
    try:
        profile = jsontext.decode(text, type=_Profile)
    except msgspec.DecodeError as bad:
        raise InvalidArgument(f"decoding seccomp profile failed: {bad}") from bad
    made: Filter = {"defaultAction": profile.default_action}
    if profile.default_errno is not None:
        made["defaultErrnoRet"] = profile.default_errno
    made["architectures"] = profile.architectures or _ARCHES.get(platform.machine(), [])
    rules: list[Filter] = []
    for entry in profile.syscalls or []:
        names = entry.names or ([entry.name] if entry.name else [])
        if not names or not _applies(entry, capabilities):
            continue
        rule = _rule(names, entry.action)
        if entry.args:
            rule["args"] = msgspec.to_builtins(entry.args)
        if entry.errno is not None:
            rule["errnoRet"] = entry.errno
        rules.append(rule)
    if rules:
        made["syscalls"] = rules
    return made


def _applies(entry: _Syscalls, capabilities: Collection[str]) -> bool:
    includes, excludes = entry.includes or _Condition(), entry.excludes or _Condition()
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    if any(cap in capabilities for cap in excludes.caps or ()):
        return False
    if machine in (excludes.arches or ()):
        return False
    if not all(cap in capabilities for cap in includes.caps or ()):
        return False
    if includes.arches and machine not in includes.arches:
        return False
    if excludes.min_kernel and _kernel() >= _parsed(excludes.min_kernel):
        return False
    return not (includes.min_kernel and _kernel() < _parsed(includes.min_kernel))


def _kernel() -> tuple[int, ...]:
    return _parsed(os.uname().release)


def _parsed(version: str) -> tuple[int, ...]:
    numbers = version.split("-")[0].split(".")[:2]
    return tuple(int(part) for part in numbers if part.isdecimal())
