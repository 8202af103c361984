import pytest

from lazarette.runtime.images.instructions import apply_changes, duration_ns, words
from lazarette.runtime.images.model import Healthcheck, RunConfig
from lazarette.storage.errors import InvalidArgument


def test_every_instruction_changes_its_field_and_leaves_the_given_config_alone() -> None:
    given = RunConfig(env=["A=1", "B=2"], working_dir="/srv", cmd=["old"])
    made = apply_changes(
        given,
        [
            'CMD ["a", "b c"]',
            'ENV A=x "C=d e" F=g\\ h',
            "env B two words",
            "EXPOSE 80 90-91/udp",
            'LABEL k=v "long key"=\'with "quotes"\'',
            "USER 7:8",
            'VOLUME ["/data", "/more"]',
            "VOLUME /third",
            "WORKDIR rel/../app",
            "STOPSIGNAL SIGINT",
            "ONBUILD RUN make",
            'SHELL ["/bin/bash", "-c"]',
            "HEALTHCHECK --interval=1m30s --retries=2 CMD curl -f localhost",
        ],
    )
    assert given == RunConfig(env=["A=1", "B=2"], working_dir="/srv", cmd=["old"])
    assert made.cmd == ["a", "b c"]
    assert made.env == ["A=x", "B=two words", "C=d e", "F=g h"]
    assert made.exposed_ports == {"80/tcp": {}, "90/udp": {}, "91/udp": {}}
    assert made.labels == {"k": "v", "long key": 'with "quotes"'}
    assert made.user == "7:8"
    assert made.volumes == {"/data": {}, "/more": {}, "/third": {}}
    assert made.working_dir == "/srv/app"
    assert made.stop_signal == "SIGINT"
    assert made.on_build == ["RUN make"]
    assert made.shell == ["/bin/bash", "-c"]
    assert made.healthcheck == Healthcheck(
        test=["CMD-SHELL", "curl -f localhost"], interval=90 * 10**9, retries=2
    )


def test_shell_form_uses_the_shell_and_entrypoint_clears_cmd() -> None:
    made = apply_changes(RunConfig(cmd=["x"]), ["ENTRYPOINT exec top -b"])
    assert (made.entrypoint, made.cmd) == (["/bin/sh", "-c", "exec top -b"], None)


@pytest.mark.parametrize(
    "change",
    ["RUN make", "FROM a", "COPY a b", "ENV", "ENV A", "LABEL a=b c", "EXPOSE x", "EXPOSE 70000",
     "HEALTHCHECK maybe", "ONBUILD FROM x", "SHELL bash"],
)  # fmt: skip
def test_refuses_what_a_change_may_not_be(change: str) -> None:
    with pytest.raises(InvalidArgument):
        apply_changes(RunConfig(), [change])


def test_words_and_durations() -> None:
    assert words('a \'b c\' "d \\" e" f\\ g') == ["a", "b c", 'd " e', "f g"]
    assert duration_ns("1h1.5s10ms") == 3601510 * 10**6
    with pytest.raises(InvalidArgument):
        duration_ns("5 parsecs")
