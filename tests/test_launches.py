from benchmarks.launches import count_launches

PROGRAM = """HloModule jit_step
%body.1 (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %f.2 = f32[] fusion(%x), kind=kLoop, calls=%fused
  %start = (f32[], f32[8]) all-gather-start(%f.2), dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %p = pred[] custom-call(%done), custom_call_target="kernel"
  ROOT %c = f32[] conditional(%p, %x, %x), true_computation=%few, false_computation=%many
}

%few (x: f32[]) -> f32[] {
  ROOT %y = f32[] fusion(%x), kind=kLoop, calls=%fused
}

%many (x: f32[]) -> f32[] {
  %a = f32[] all-to-all(%x), dimensions={0}
  ROOT %y = f32[] fusion(%a), kind=kLoop, calls=%fused
}

%small (x: f32[]) -> f32[] {
  ROOT %y = f32[] fusion(%x), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %w = f32[] while(%x), condition=%cond, body=%small
  ROOT %v = f32[] while(%w), condition=%cond, body=%body.1
}"""


def test_launches_are_those_of_the_largest_loop_with_its_fullest_branch():
    assert count_launches(PROGRAM) == (3 + 2, 2)
    listed = PROGRAM.replace(
        "true_computation=%few, false_computation=%many", "branch_computations={%few, %many}"
    )
    assert count_launches(listed) == (3 + 2, 2)
