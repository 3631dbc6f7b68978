// Detect in an image with OpenVINO in C++17. No other library: pictures are .ppm (P6), classes are numbers.
//
//     OV=$(python -c "import openvino, os; print(os.path.dirname(openvino.__file__))")
//     LIBRARY="-L$OV/libs -l:$(basename $OV/libs/libopenvino.so.*) -Wl,-rpath,$OV/libs"
//     g++ -O2 -std=c++17 examples/detect_openvino.cpp -o detect -I$OV/include $LIBRARY
//     ./detect best_openvino_model/model.xml photo.ppm detected.ppm       (or best.onnx)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

struct Image {
    int width = 0, height = 0;
    std::vector<unsigned char> pixels;  // RGB, row by row

    unsigned char* at(int x, int y) { return &pixels[3 * (static_cast<size_t>(y) * width + x)]; }
    const unsigned char* at(int x, int y) const { return &pixels[3 * (static_cast<size_t>(y) * width + x)]; }
};

struct Box {
    float x1, y1, x2, y2, confidence;
    int label;
};

Image read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    Image image;
    int most = 0;
    if (!(file >> kind >> image.width >> image.height >> most) || kind != "P6" || most != 255 || image.width < 1 ||
        image.height < 1)
        throw std::runtime_error(path + ": not a binary .ppm of 8 bits");
    file.get();  // the one blank behind the header
    image.pixels.resize(3 * static_cast<size_t>(image.width) * image.height);
    if (!file.read(reinterpret_cast<char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size())))
        throw std::runtime_error(path + ": is cut off");
    return image;
}

void write(const std::string& path, const Image& image) {
    std::ofstream file(path, std::ios::binary);
    file << "P6\n" << image.width << " " << image.height << "\n255\n";
    file.write(reinterpret_cast<const char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size()));
}

// Where the two neighbours of a pixel of the resized image lie, and the share of the second.
struct Neighbours {
    int low, high;
    float share;
};

Neighbours neighbours(int position, int from, int to) {
    const float centre = (position + 0.5f) * from / to - 0.5f;
    const int low = static_cast<int>(std::floor(centre));
    return {std::clamp(low, 0, from - 1), std::clamp(low + 1, 0, from - 1), centre - low};
}

// Bilinear, in the middle of grey; `data` is (3, height, width) in 0..1.
void letterbox(const Image& image, int height, int width, float* data) {
    const double ratio = std::min(double(height) / image.height, double(width) / image.width);
    const int h = std::max(int(std::nearbyint(image.height * ratio)), 1);
    const int w = std::max(int(std::nearbyint(image.width * ratio)), 1);
    const int top = int(std::nearbyint((height - h) / 2.0 - 0.1)), left = int(std::nearbyint((width - w) / 2.0 - 0.1));
    std::fill(data, data + 3 * size_t(height) * width, 114 / 255.0f);
    for (int y = 0; y < h; ++y) {
        const Neighbours v = neighbours(y, image.height, h);
        for (int x = 0; x < w; ++x) {
            const Neighbours u = neighbours(x, image.width, w);
            for (int c = 0; c < 3; ++c) {
                const float above = image.at(u.low, v.low)[c] * (1 - u.share) + image.at(u.high, v.low)[c] * u.share;
                const float below = image.at(u.low, v.high)[c] * (1 - u.share) + image.at(u.high, v.high)[c] * u.share;
                data[(size_t(c) * height + top + y) * width + left + x] =
                    std::nearbyint(above * (1 - v.share) + below * v.share) / 255;
            }
        }
    }
}

float overlap(const Box& a, const Box& b) {
    const float w = std::min(a.x2, b.x2) - std::max(a.x1, b.x1), h = std::min(a.y2, b.y2) - std::max(a.y1, b.y1);
    const float both = std::max(w, 0.0f) * std::max(h, 0.0f);
    const float all = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - both;
    return all > 0 ? both / all : 0;
}

// `rows` of `width` numbers each: x, y, w, h in pixels, objectness, classes. NMS goes class by class.
std::vector<Box> find(const float* rows, size_t count, size_t width, float confidence, float iou) {
    std::vector<Box> candidates, found;
    for (const float* row = rows; row != rows + count * width; row += width) {
        const float* best = std::max_element(row + 5, row + width);
        if (row[4] > confidence && row[4] * *best > confidence)
            candidates.push_back({row[0] - row[2] / 2, row[1] - row[3] / 2, row[0] + row[2] / 2, row[1] + row[3] / 2,
                                  row[4] * *best, int(best - row) - 5});
    }
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Box& a, const Box& b) { return a.confidence > b.confidence; });
    for (const Box& box : candidates)
        if (std::none_of(found.begin(), found.end(),
                         [&](const Box& other) { return other.label == box.label && overlap(other, box) > iou; }))
            found.push_back(box);
    return found;
}

// From the letterbox into the image.
Box back(Box box, const Image& image, int height, int width) {
    const float ratio = std::min(float(height) / image.height, float(width) / image.width);
    const float left = (width - image.width * ratio) / 2, top = (height - image.height * ratio) / 2;
    for (float* x : {&box.x1, &box.x2}) *x = std::clamp((*x - left) / ratio, 0.0f, float(image.width));
    for (float* y : {&box.y1, &box.y2}) *y = std::clamp((*y - top) / ratio, 0.0f, float(image.height));
    return box;
}

void draw(Image& image, const Box& box) {
    const int x1 = std::min(int(box.x1), image.width - 1), x2 = std::min(int(box.x2), image.width - 1);
    const int y1 = std::min(int(box.y1), image.height - 1), y2 = std::min(int(box.y2), image.height - 1);
    const unsigned char red[3] = {255, 56, 56};
    for (int x = x1; x <= x2; ++x)
        for (int y : {y1, y2}) std::copy(red, red + 3, image.at(x, y));
    for (int y = y1; y <= y2; ++y)
        for (int x : {x1, x2}) std::copy(red, red + 3, image.at(x, y));
}

int main(int argc, char** argv) try {
    if (argc != 4) throw std::runtime_error("usage: detect model.xml|model.onnx photo.ppm detected.ppm");
    Image image = read(argv[2]);
    ov::Core core;
    auto compiled = core.compile_model(argv[1], "CPU", ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                                       ov::hint::inference_precision(ov::element::f32));
    const ov::Shape shape = compiled.input().get_shape();  // a file of one fixed size: export.py without --dynamic
    const int height = int(shape[2]), width = int(shape[3]);
    ov::Tensor pixels(ov::element::f32, shape);
    letterbox(image, height, width, pixels.data<float>());
    ov::InferRequest request = compiled.create_infer_request();
    request.set_input_tensor(pixels);
    request.infer();
    const ov::Tensor decoded = request.get_output_tensor();
    const ov::Shape output = decoded.get_shape();
    for (const Box& found : find(decoded.data<float>(), output[1], output[2], 0.25f, 0.45f)) {
        const Box box = back(found, image, height, width);
        std::printf("%d %.4f %.1f %.1f %.1f %.1f\n", box.label, box.confidence, box.x1, box.y1, box.x2, box.y2);
        draw(image, box);
    }
    write(argv[3], image);
    return 0;
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 2;
}
