// Written by tools/gaussian_table.py, which says what the numbers are. Do not edit.
#ifndef JPK_GAUSSIAN_TABLE_H_
#define JPK_GAUSSIAN_TABLE_H_

namespace jpk::gaussian_table {

// clang-format off
inline constexpr double kCentral[] = {
    -0x1.cc31adcc14a2fp-64,
    0x1.1bfc2ef1101afp-62,
    0x1.0026223abbd4ep-57,
    -0x1.5df2ae96dc26bp-55,
    -0x1.bd82489966e3ap-53,
    0x1.82925e5f09520p-49,
    -0x1.25995fdedb86ep-48,
    -0x1.e4dad62ce5accp-44,
    0x1.aa6f71c9f9355p-41,
    0x1.6adcfaacdba45p-40,
    -0x1.82e7a0bdd8ae8p-35,
    0x1.73f6e2d16a073p-33,
    0x1.60b39f4e6eed7p-30,
    -0x1.07e20c8c49855p-26,
    0x1.45f987196d067p-26,
    0x1.6b78e0eb70983p-21,
    -0x1.44423410f8c7dp-18,
    -0x1.da28c519483e4p-18,
    0x1.43a5452e8dbc3p-12,
    -0x1.d069d456b9876p-10,
    -0x1.83296808f7513p-8,
    0x1.652c5b9e4a461p-2,
    0x1.0fc8bc55fe004p+1,
};
inline constexpr double kMiddle[] = {
    -0x1.057cb4bebcb2ap-28,
    0x1.126124f7f5eb5p-26,
    -0x1.f95ecf43baac0p-28,
    -0x1.7a84b5b75086ep-24,
    0x1.024ce8e3263d3p-22,
    -0x1.fb0e2c9c7f92ap-24,
    -0x1.e9bd8510f6397p-21,
    0x1.7c4f718ba83c4p-19,
    -0x1.39b8bdbb0008fp-19,
    -0x1.1a53d918c0e13p-17,
    0x1.0438d0d187a13p-15,
    -0x1.0f57d67454e7ap-15,
    -0x1.139683f9727adp-14,
    0x1.30c335ff08719p-12,
    -0x1.a3d91b80c0353p-12,
    -0x1.b99ae54a58927p-13,
    0x1.1307fc28fe4d6p-9,
    -0x1.49d5f66a1e482p-8,
    0x1.0774edd8a8662p-7,
    -0x1.6238a156843d9p-7,
    0x1.b5b6e712abdf8p-7,
    0x1.6aa52af843546p+0,
    0x1.00696b0914436p+2,
};
inline constexpr double kFar[] = {
    0x1.5f3a45ac68bf6p-39,
    -0x1.3fcfdb2a40712p-36,
    0x1.dd195edee7e09p-37,
    0x1.f2084afe800cbp-34,
    0x1.c3dcaef6f13cfp-32,
    -0x1.6364d7b302197p-28,
    0x1.c85b60df143a7p-26,
    -0x1.36271033db52ep-23,
    0x1.b63e08f14d86dp-21,
    -0x1.152a5cf097dd4p-18,
    0x1.1266c112ac10dp-16,
    -0x1.001224b1b80f6p-16,
    -0x1.7a9e62dc2be9ep-11,
    0x1.6d562cf546e61p+0,
    0x1.20075346b984ap+3,
};
inline constexpr double kCentralBound = 0x1.456bdcd6f9ba9p-51;
inline constexpr double kMiddleBound = 0x1.60f4b977fcadbp-48;
inline constexpr double kFarBound = 0x1.8e044a8a65c2ap-31;
// clang-format on

}  // namespace jpk::gaussian_table

#endif  // JPK_GAUSSIAN_TABLE_H_
